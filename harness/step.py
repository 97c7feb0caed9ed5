"""One step of the optimiser: taken operation by operation, or replayed as a CUDA graph.

Taken (`EagerStep`), each operation is started by Python, some 5 microseconds of the host for each.
A step of the paper's model has hundreds of them and keeps a GPU busy for a tenth of that time. A
CUDA graph is the record of all that a step does on the device; replaying it takes one call.

Replayed (`CapturedStep`), the whole step is one graph: forward and backward of all micro-batches,
the norm of the gradients where it is shown or clipped, the optimiser. A graph repeats the same
operations on the same memory, so what differs from step to step lies in tensors that stay:

- `Inputs`: the base key of the noise and the tokens of each micro-batch, one copy a step from
  pinned memory, behind which the host does not wait. A few steps may be under way at once.
- The learning rate, a tensor in the optimiser's groups, filled where the rate changes. In float32,
  as PyTorch's kernels want it, it differs from the rate of an eager step by a rounding: losses of
  a captured run and an eager one agree to rounding only.
- What layers have learned. A step that is not replayed leaves new tensors in their place; their
  values are put back where the graphs look.

Methods that learn at some steps do other work there: a graph for each set of layers that learn,
and for steps that show the norm of the gradients, `MOST` of them at most. The first `WARM_UP` steps
of a kind are taken eagerly, since a first time allocates, chooses kernels and compiles; the next
one is captured, then replayed. So a resumed run captures after it has been restored, and nothing
of a graph is saved. When the rank changes all are forgotten. A row of metrics with
`diagnostics.monitor` is a step taken eagerly.

What can't be captured: a look at values by the host (method=zeroth_order, method.energy; harness/
config.py refuses these), and operations of PyTorch that wait for the device. Where `cuda_graph` is
null, a step that turns out to be of that kind is taken eagerly from then on, after a warning.

Kept: the memory that a step needs at its fullest, which other steps can't use in between.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from basis import sketched_layers
from basis.noise_key import assign_keys, base_key
from data import Sampler
from harness.run import Run
from harness.world import whole

WARM_UP = 2
MOST = 8
SLOTS = 4
"""Steps whose inputs may wait for the device."""

log = logging.getLogger(__name__)


class CaptureError(RuntimeError):
    """cuda_graph=true, and a step can't be captured."""


def make_step(run: Run) -> EagerStep | CapturedStep:
    """What takes the steps of `run`, as its runtime says."""
    return CapturedStep(run) if run.runtime.cuda_graph else EagerStep(run)


class EagerStep:
    """Called with the learning rate and whether the step's numbers are to be shown: takes the next
    step of `run`; the mean loss (), and the norm of the gradients () if it is known.
    """

    peak_bytes = 0

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, rate: float, shown: bool) -> tuple[Tensor, Tensor | None]:
        run = self.run
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        with run.watching(shown):
            loss = _gradients(run, lambda micro_batch: run.micro_batch_loss(run.step, micro_batch))
        return loss, _update(run, shown)


def _gradients(run: Run, loss_of: Callable[[int], Tensor]) -> Tensor:
    """Add up the gradients of all micro-batches; the mean of their losses in this process, ()."""
    losses = []
    last = run.config.micro_batches - 1
    for micro_batch in range(run.config.micro_batches):
        if run.zeroth_order is not None:
            loss = run.zeroth_order_gradient(micro_batch, run.config.micro_batches)
        else:
            with run.parallel.micro_batch(last=micro_batch == last):
                loss = loss_of(micro_batch)
                (loss / run.config.micro_batches).backward()
            if micro_batch == 0:
                run.parallel.share_learned(run.step)
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def _update(run: Run, shown: bool) -> Tensor | None:
    """Clip, let the optimiser step, drop the gradients; their norm, where clipping or `shown` asks
    for it.
    """
    norm, clip = None, run.config.optim.grad_clip
    if clip is not None:
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), clip)
    elif shown:  # a pass over all gradients
        norm = torch.nn.utils.get_total_norm(
            p.grad for p in run.model.parameters() if p.grad is not None
        )
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return None if norm is None else whole(norm)


class Inputs:
    """What a step reads, on the device and always at the same place: int64 (micro-batches, 1 + b
    (T + 1)), of each micro-batch the base key, then its windows of tokens.
    """

    def __init__(self, sampler: Sampler, seed: int, device: torch.device) -> None:
        self.sampler, self.seed, cuda = sampler, seed, device.type == "cuda"
        batch, block = sampler.batch_size, sampler.block_size
        shape = (sampler.micro_batches, 1 + batch * (block + 1))
        self._fixed = torch.zeros(shape, dtype=torch.int64, device=device)
        self.keys = self._fixed[:, 0]
        self._windows = self._fixed[:, 1:].unflatten(1, (batch, block + 1))
        slots = SLOTS if cuda else 1
        self._slots = [torch.zeros(shape, dtype=torch.int64, pin_memory=cuda) for _ in range(slots)]
        self._arrays = [slot.numpy() for slot in self._slots]
        self._copied = [torch.cuda.Event() for _ in range(slots if cuda else 0)]

    def load(self, step: int) -> None:
        """Put in place what `step` reads; the device takes it once it has done what was asked of it
        before.
        """
        place = step % len(self._slots)
        if self._copied:
            self._copied[place].synchronize()  # the slot is free again
        for micro_batch, row in enumerate(self._arrays[place]):
            row[0] = base_key(seed=self.seed, step=step, micro_batch=micro_batch)
            row[1:] = self.sampler.windows(step, micro_batch).reshape(-1)
        self._fixed.copy_(self._slots[place], non_blocking=True)
        if self._copied:
            self._copied[place].record()

    def batch(self, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (b, T) of a micro-batch, made where the windows lie."""
        windows = self._windows[micro_batch]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class CudaGraphs:
    """What PyTorch has for it: a stream aside, on which work can be recorded, and memory that the
    records share. They are replayed one after another, and leave nothing in it for the next.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def aside(self, work: Callable[[], None]) -> None:
        """Do `work` on that stream, after what was asked for before and before what follows."""
        here = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            work()
        here.wait_stream(self.stream)

    def record(self, work: Callable[[], None]) -> tuple[Callable[[], None], int]:
        """A function that repeats what `work` does on the device, which is not done now; and the
        most bytes of tensors that there are meanwhile.

        Raises torch.OutOfMemoryError, and RuntimeError for what can't be recorded.
        """
        graph, memory = torch.cuda.CUDAGraph(), None
        torch.cuda.reset_peak_memory_stats(self.stream.device)
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                try:
                    work()
                except torch.OutOfMemoryError as error:
                    memory = error
                    raise
        except RuntimeError:  # of the end of the record, which hides what ended it
            if memory is not None:
                raise memory from None
            raise
        return graph.replay, torch.cuda.max_memory_allocated(self.stream.device)


Kind = tuple[tuple[bool, ...], bool]
"""Which layers learn; whether the numbers of the step are shown."""


class CapturedStep:
    """As `EagerStep`, from graphs. Made when the run has been restored; the optimiser's groups get
    a rate that is a tensor.

    peak_bytes: most bytes of tensors while a step was recorded; a replay allocates nothing.
    """

    graphs: type[CudaGraphs] = CudaGraphs

    def __init__(self, run: Run) -> None:
        device = run.runtime.device
        self.run, self.peak_bytes = run, 0
        self._graphs = self.graphs(device)
        self._inputs = Inputs(run.sampler, run.config.seed, device)
        self._loss, self._norm = torch.zeros((), device=device), torch.zeros((), device=device)
        self._rate, self._rate_now = torch.zeros((), device=device), 0.0
        for group in run.optimizer.param_groups:
            group["lr"] = self._rate
        self._eager: set[Kind] = set()
        self._forget()

    def _forget(self) -> None:
        """Begin without graphs, with the layers as they are now."""
        self.run.runtime.synchronize()  # a graph may be under way
        self._replays: dict[Kind, Callable[[], None]] = {}
        self._taken: Counter[Kind] = Counter()
        self._rank_since = self._rank_is_of()
        self._layers = [layer for _, layer in sketched_layers(self.run.model) if layer.state]
        self._learned: list[tuple[nn.Module, str, Tensor]] = [
            (layer, f"estimator_{name}", tensor)
            for layer in self._layers
            for name, tensor in layer.state.items()
        ]

    def _rank_is_of(self) -> int:
        control = self.run.rank_control
        return 0 if control is None else control.since

    def __call__(self, rate: float, shown: bool) -> tuple[Tensor, Tensor | None]:
        if self._rank_is_of() != self._rank_since:
            self._forget()
        run, step = self.run, self.run.step
        self._inputs.load(step)
        if rate != self._rate_now:
            self._rate.fill_(rate)
            self._rate_now = rate
        learners = (layer.estimator.learns_at(step - layer.first_step) for layer in self._layers)
        kind = tuple(learners), shown
        watched = shown and run.monitor is not None
        if not watched and kind not in self._replays and self._to_be_captured(kind):
            self._capture(kind)
        if watched or kind not in self._replays:
            with run.watching(watched):
                self._graphs.aside(lambda: self._work(shown))
            self._taken[kind] += not watched
            self._put_back()
        else:
            self._replays[kind]()
        known = shown or run.config.optim.grad_clip is not None
        return self._loss.clone(), self._norm if known else None

    def _work(self, shown: bool) -> None:
        """The step, from tensors that stay to tensors that stay."""
        run = self.run

        def loss_of(micro_batch: int) -> Tensor:
            key = self._inputs.keys[micro_batch]
            assign_keys(run.model, key, step=run.step, micro_batch=micro_batch)
            return run.runtime.forward(run.forward, *self._inputs.batch(micro_batch))

        self._loss.copy_(_gradients(run, loss_of))
        norm = _update(run, shown)
        if norm is not None:
            self._norm.copy_(norm)

    def _to_be_captured(self, kind: Kind) -> bool:
        return (
            kind not in self._eager and self._taken[kind] >= WARM_UP and len(self._replays) < MOST
        )

    def _capture(self, kind: Kind) -> None:
        def work() -> None:
            # AdamW wants this said, and warns where it is said and not done. Fused it is no other.
            for group in self.run.optimizer.param_groups:
                group["capturable"] = True
            self._work(kind[1])

        try:
            self._replays[kind], peak = self._graphs.record(work)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = str(error).partition("\n")[0]
            if self.run.config.cuda_graph:
                raise CaptureError(
                    f"cuda_graph=true: a step of this run can't be captured ({why}); give "
                    "cuda_graph=false"
                ) from error
            log.warning(
                "cuda_graph=null: step %d and its like can't be captured (%s) and are taken one "
                "operation at a time",
                self.run.step,
                why,
            )
            self._eager.add(kind)
            self.run.optimizer.zero_grad(set_to_none=True)
        else:
            self.peak_bytes = max(self.peak_bytes, peak)
        finally:
            for group in self.run.optimizer.param_groups:
                group["capturable"] = False

    def _put_back(self) -> None:
        """What layers have learned in a step that was taken: into the tensors that the graphs
        know.
        """
        for layer, name, known in self._learned:
            new = getattr(layer, name)
            if new is not known:
                known.copy_(new)
                setattr(layer, name, known)
