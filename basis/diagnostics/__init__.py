"""What looks at a model's layers, or sets their options; training needs none of it.

quality         estimated against exact weight gradients: error, cosine, bias, variance
monitor         sketches of activations and gradients: norms, stable rank, drift
budget          the option of a method at which it keeps a given share of X
adaptive_rank   a rank that follows the error of what is kept
saved           what is kept for backward without autograd knowing of it, for memory accounting
"""
