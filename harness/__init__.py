"""One run: everything that a training run needs around its model, from options to a run folder.

train.py reads from top to bottom what a run does; each module here is one part of it. In the order
in which a run meets them:

*Options to values.* conf/ holds the options, Hydra composes them. `config` gives them types, checks
them and makes the frozen `Config`; `method` holds the estimator of dW, made once, with the layers
it is for and its byte budget. `activations`, `attention`, `optim`, `rank_control`, `tracker` each
declare and check the options of one group, next to the code that uses them. `command_line` turns
what Hydra refuses into one line, and lets Ctrl-C save first.

*Values to a run.* `set_up` puts a run together in the order in which it can be refused. It asks
`device` where to compute, `rundir` whether the folder holds another run, `build` for text and model
and `layer_budgets` for the knob of each layer, where a budget is divided by measured errors.

*The run.* `run` is the state between two steps: the loss of a micro-batch, measurements, saving and
resuming. `step` takes a step, or replays it as a CUDA graph; `zeroth_order` replaces backward,
`rank_control` changes the rank, `memory` counts bytes, `memory_limit` compares them with what there
is.

*What it leaves.* `rundir` names the files; `metrics` writes metrics.jsonl, the source of truth;
`checkpoint` and `manifest` write states that a kill cannot damage unseen; `run_id` holds the run's
id and labels, `one_run` looks whether all files are of one run; `tracker` mirrors the metrics to
wandb; `provenance` says command, commit and machine. `bounded` reads small files that may come from
anywhere; `disk` says in words what a disk refused. `sweep` lists the failed jobs of a sweep.

*Afterwards.* `trained` reads a trained model back.

Neither basis/ nor models/ imports anything from here. Importing the package imports nothing: each
module brings in torch, hydra or wandb where it needs them.
"""
