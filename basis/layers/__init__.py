"""Dense layers that are no nn.Linear, what stands in for each, and what is left as it is.

    sketch.py      which modules `basis.convert(model, estimator)` replaces, and by what
    conv1d.py      transformers' Conv1D, the dense layer of GPT-2
    left.py        what was left, and why

Other libraries' classes are told by what they are called or have: none of them is imported.
"""
