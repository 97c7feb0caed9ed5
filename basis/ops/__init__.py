"""The mathematics of the library: functions of tensors that know neither layers nor methods. They
import nothing of basis except each other.

    noise                  random bits, signs, normal numbers and hashings as functions of a key
    matrix                 rows of a matrix: signed sums, norms, blocks, sums down a tall matrix
    bits                   codes of 1 to 8 bits in bytes
    gaussian_code          few bits a number, without bias, for numbers that are nearly normal
    principal_directions   the directions in which X varies most, followed from step to step
    three_sketch           three random sketches of a matrix, and the matrix from them
"""
