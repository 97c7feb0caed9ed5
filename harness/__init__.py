"""One run: everything that a training run needs around its model, from options to a run folder.

train.py reads from top to bottom what a run does; each module here is one part of it. In the order
in which a run meets them:

*Options to values.* conf/ holds the options, Hydra composes them. `config` gives them types and
checks them, `compose` makes the frozen `Config` of what Hydra gives; `method` holds the estimator
of dW, made once, with the layers it is for and its byte budget. `activations`, `attention`,
`optim`, `rank_control`, `tracker` each declare and check the options of one group, next to the code
that uses them. `command_line` turns what Hydra refuses into one line, and lets Ctrl-C save first;
`terminal` keeps a reader that goes away from ending anything.

*Values to a run.* `set_up` puts a run together in the order in which it can be refused. It asks
`device` where to compute, `rundir` whether the folder holds another run, `build` for text and model
and `layer_budgets` for the knob of each layer, where a budget is divided by measured errors.

`world` says which process of how many this is and how they agree, `parallel` divides the model
among them.

*The run.* `run` is the state between two steps: the loss of a micro-batch and measurements.
`describe` says what is about to run, `saving` makes a checkpoint and goes on from one. `step` takes
a step, or replays it as a CUDA graph; `zeroth_order` replaces backward,
`rank_control` changes the rank, `memory` counts bytes, `memory_limit` compares them with what there
is.

*What it leaves.* folder/ holds all that is about the run folder: its files, id, checkpoints,
metrics, summary, and whether they are whole and of one run. `tracker` mirrors the metrics to wandb;
`provenance` says command, commit and machine; `profile` records some steps. `sweep` lists the
failed jobs of a sweep, `worker` those that ran in other processes.

*Afterwards.* `trained` reads a trained model back.

Neither basis/ nor models/ imports anything from here. Importing the package imports nothing: each
module brings in torch, hydra or wandb where it needs them.
"""
