"""Compiles the codecs' kernels for cards that need not be there, without Triton's interpreter. For
test_triton_compiles.py, in a process of its own.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from basis.ops.group_code import Part
from basis.ops.triton import gaussian_code, group_code, rounding, softmax, step_code

POINTERS = {
    **dict.fromkeys(("x", "z", "y", "out", "boundaries", "levels"), "*bf16"),
    **dict.fromkeys(("scales", "shift", "cosine"), "*fp32"),
    **dict.fromkeys(("ranges", "starts"), "*i32"),
    **dict.fromkeys(("shares", "losses", "squares"), "*fp32"),
    **dict.fromkeys(("key", "targets"), "*i64"),
    "at_targets": "*bf16",
    "packed": "*u8",
}


def compile_for(capability: int, kernel, constants: dict, codes: str = "*u8") -> None:
    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps", 4)}
    types = {**POINTERS, "codes": codes}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    for capability in (80, 90):
        for bits in (4, 5):
            _, sizes = group_code._sizes(Part(slice(0, 64), bits, slice(0, 64)), 128, 768)
            compile_for(capability, group_code._encode, sizes)
            compile_for(capability, group_code._decode, {**sizes, "DITHERED": True})
        _, sizes = rounding._sizes(1000, 768, 64)
        compile_for(capability, rounding._encode, sizes, "*i8")
        compile_for(capability, rounding._decode, sizes, "*i8")
        for kernel in (step_code._encode, step_code._times_levels):
            compile_for(capability, kernel, {"BITS": 2, "BYTES": 512})
        sizes = {"CLASSES": 211, "PADDED": 256, "WHOLE": 128, "TILE": 128}
        for terms in ((0.0, 0.0, 0.0), (0.1, 0.02, 30.0)):
            own = dict(zip(("SMOOTHING", "Z_LOSS", "SOFTCAP"), terms, strict=True))
            compile_for(capability, softmax._gradient, {**sizes, **own})
        for blocks in (12, 64):
            sizes = gaussian_code._constants(blocks, torch.bfloat16)
            compile_for(capability, gaussian_code._encode, sizes)
            compile_for(capability, gaussian_code._decode, sizes)


if __name__ == "__main__":
    main()
