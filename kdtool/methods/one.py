"""Online distillation by an ensemble of the student's own branches, which share its lower layers (ONE).

K branches, the student and K - 1 others with upper layers and a head of their own, on one trunk; g = softmax(W h)
over the trunk's pooled output h says how much each branch counts:

    z_e = sum_k g_k z_k
    L   = sum_k CE(y, z_k) + CE(y, z_e) + w T^2 sum_k KL(softmax(z_e / T) || softmax(z_k / T))

The ensemble is constant in the divergences. The student alone is saved, so that nothing of this costs at inference.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kdtool.data.examples import Examples
from kdtool.errors import ConfigProblem
from kdtool.features import stages_of
from kdtool.methods import _base
from kdtool.methods._maps import vector_of
from kdtool.methods._online import fresh, kl, label_loss
from kdtool.methods._targets import precise
from kdtool.methods._terms import Side, ramped
from kdtool.models import Loaded
from kdtool.tasks._base import Batch, Task


@dataclass(frozen=True, slots=True)
class Config:
    """How many branches, and where they part."""

    branches: Annotated[int, Field(ge=2)] = 3
    """K, the student among them."""
    split: int = -1
    """Number of the stage or layer from which each branch has its own."""
    temperature: Annotated[float, Field(gt=0)] = 3.0
    """T of the divergences."""
    kd_weight: Annotated[float, Field(ge=0)] = 1.0
    """w, weight of what the branches learn from their ensemble."""
    delay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of training before that sets in."""
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of training over which it then rises linearly."""


def ensemble_loss(
    logits: Sequence[Tensor], gates: Tensor, labels: Tensor, weight: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The three addends as sums over units, in float32, or float64 for float64 logits.

    Args:
        logits: [units, classes] of each of K branches.
        gates: [units, K], rows of sum 1.
        labels: [units]
        weight: w.
        temperature: T.

    Returns:
        Cross-entropies of all branches, cross-entropy of the ensemble, weighted divergences.
    """
    stack = torch.stack([precise(z) for z in logits], 1)
    ensemble = (gates.to(stack.dtype).unsqueeze(-1) * stack).sum(1)
    own = torch.stack([label_loss(z, labels) for z in logits]).sum()
    apart = torch.stack([kl(ensemble.detach(), z, temperature).sum() for z in logits]).sum()
    return own, label_loss(ensemble, labels), weight * temperature**2 * apart


class _Recorded(nn.Module):
    """Stands in a branch for a module of the trunk: gives what the student's own gave, without running it."""

    def __init__(self, original: nn.Module, path: str, store: dict[str, Any]) -> None:
        super().__init__()
        # a tuple, so that the student's module is no child of this one
        self._outside = (original, path, store)

    def forward(self, *args: Any, **_: Any) -> Any:
        """The recorded output; what came in where the student left the module out (layer drop)."""
        _, path, store = self.__dict__["_outside"]
        return _own(store.get(path, args[0] if args else None))

    def __getattr__(self, name: str) -> Any:
        """Facts such as a patch size, which models read from their parts."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_outside"][0], name)


def _own(output: Any) -> Any:
    """A copy that a model may change in place, as some do with what their parts give."""
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(map(_own, output)) if isinstance(output, tuple) else output


def _candidates(model: nn.Module, stages: Sequence[str]) -> dict[str, nn.Module]:
    """The stages, and all other parts of the modules that hold them."""
    holders = {""}
    for stage in stages:
        parts = stage.split(".")
        holders |= {".".join(parts[:depth]) for depth in range(1, len(parts))}
    found: dict[str, nn.Module] = {}
    for holder in sorted(holders):
        for name, child in model.get_submodule(holder).named_children():
            path = f"{holder}.{name}".lstrip(".")
            if path not in holders:
                found[path] = child
    return found


@contextmanager
def _recording(modules: dict[str, nn.Module], store: dict[str, Any], order: list[str] | None = None) -> Iterator[None]:
    """Keep the modules' outputs of forward passes inside, and the order in which they are called."""

    def note(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any) -> None:
            if order is not None:
                order.append(path)

        return hook

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            store[path] = output

        return hook

    store.clear()
    handles = [module.register_forward_pre_hook(note(path)) for path, module in modules.items()]
    handles += [module.register_forward_hook(keep(path)) for path, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _main(output: Any) -> Tensor:
    """The tensor of a module's output."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output


class Method(_base.Method):
    """ONE: branches of the student teach each other through their gated ensemble; no teacher."""

    paper: ClassVar[str] = (
        "Lan, Zhu, Gong: Knowledge Distillation by On-the-Fly Native Ensemble, 2018, arXiv:1806.04606"
    )
    tasks: ClassVar[frozenset[str]] = frozenset(
        {"text-classification", "image-classification", "audio-classification", "tabular-classification"}
    )
    teachers: ClassVar[tuple[int, int]] = (0, 0)
    reads_teacher: ClassVar[bool] = False
    golden: ClassVar[str] = "no reference code was run; tests/methods/test_one.py holds it to its equations"
    minimum: ClassVar[str] = "the cross-entropy of all branches pulls on weights that are equal"

    def __init__(self, config: Config, student: Loaded, teachers: Sequence[Loaded], task: Task) -> None:
        super().__init__(config, student, teachers, task)
        self._store: dict[str, Any] = {}
        self._trunk: dict[str, nn.Module] = {}
        self._last = ""

    def setup(self, batch: Batch, data: Examples) -> None:
        """Find the trunk by one forward pass, and make branches and gate.

        Raises:
            ConfigProblem: no such stage.
        """
        stages = stages_of(self.student)
        if not -len(stages) <= self.config.split < len(stages):
            raise ConfigProblem(
                f"method.split={self.config.split}: the student has stages 0 to {len(stages) - 1}",
                hint="-1 gives each branch its own last stage",
            )
        parting = stages[self.config.split]
        order: list[str] = []
        candidates = _candidates(self.student, stages)
        training = self.student.training
        self.student.eval()
        with torch.no_grad(), _recording(candidates, self._store, order):
            self.task.forward(self.student, batch)
        self.student.train(training)
        before = order[: order.index(parting)]
        # what is called again later, such as a shared activation, cannot be replaced by one output
        paths = [path for path in before if order.count(path) == 1]
        if not paths:
            raise ConfigProblem(
                f"method.split={self.config.split}: nothing of the student comes before '{parting}' to be shared",
                hint="a larger --set method.split=N",
            )
        self._trunk, self._last = {path: candidates[path] for path in paths}, paths[-1]
        width = self._trunk_vector(batch).shape[1]
        device = next(self.student.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self.gate = nn.Linear(width, self.config.branches)
            self.others = nn.ModuleList(self._branch() for _ in range(self.config.branches - 1))
        self._store.clear()

    def _branch(self) -> nn.Module:
        """A copy of the student without its trunk; new weights wherever the student's are new, and in the head."""
        random: Any = fresh(self.student)
        new = self.student_loaded.facts.get("new_weights") == ["all"]
        made: Any = random if new else copy.deepcopy(self.student)
        body = getattr(made, "base_model_prefix", "")
        if not new:  # equal branches would stay equal
            for name, child in random.named_children():
                if name != body and next(child.parameters(), None) is not None and name not in self._holders():
                    setattr(made, name, child)
        for path, original in self._trunk.items():
            parent, _, name = path.rpartition(".")
            holder = made.get_submodule(parent)
            if isinstance(holder, nn.ModuleList | nn.Sequential):
                holder[int(name)] = _Recorded(original, path, self._store)
            else:
                setattr(holder, name, _Recorded(original, path, self._store))
        return made  # type: ignore[no-any-return]

    def _holders(self) -> set[str]:
        return {path.split(".")[0] for path in (*self._trunk, stages_of(self.student)[self.config.split])}

    def logits(self, batch: Batch) -> tuple[list[Tensor], Tensor, Tensor]:
        """Logits of each branch, the student first, the gates [units, K], and the labels."""
        with _recording(self._trunk, self._store):
            out = self.task.forward(self.student, batch)
        found = [out.logits, *(self.task.forward(branch, batch).logits for branch in self.others)]
        gates = torch.softmax(self.gate(self._trunk_vector(batch)), -1)
        self._store.clear()  # what was recorded holds the graph
        return found, gates, _base.labels_of(out)

    def _trunk_vector(self, batch: Batch) -> Tensor:
        """The trunk's output as one vector per example, means over what is no padding, [units, width] float32."""
        side = Side(torch.empty(0), {"trunk": _main(self._store[self._last])}, self.student)
        return vector_of(side, "trunk", batch).float()

    def step(self, batch: Batch, progress: float) -> _base.Losses:
        """One pass of the trunk and of every branch."""
        cfg: Config = self.config
        logits, gates, labels = self.logits(batch)
        weight = cfg.kd_weight * ramped(progress, cfg.delay, cfg.ramp)
        own, together, apart = ensemble_loss(logits, gates, labels, weight, cfg.temperature)
        parts = {"branches": own.detach(), "ensemble": together.detach(), "divergence": apart.detach()}
        return _base.Losses(own + together + apart, len(labels), parts)
