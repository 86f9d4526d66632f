"""What happens on the way back from a layer, op by op, and where Captum's Deconvolution goes wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from lit_deconv.engine.tape import Op, Tape, Value
from lit_deconv.engine.walk import on_path, refusals, why_unsupported


@dataclass(frozen=True)
class Step:
    """One op on the way back.

    Attributes:
        op: Its aten name.
        module: Dotted name of the module it ran in ("" for the model's own forward).
        path: "rules" or "autograd".
        why: What its rule does, or why there is none.
    """

    op: str
    module: str
    path: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """The way back from one layer.

    Attributes:
        path: The path that is taken, "rules" or "autograd".
        rows: One ``Step`` per op, in the order in which the signal meets them.
        reasons: Why rules cannot be used; empty where they can.
        captum_faults: Why Captum's Deconvolution and NeuronDeconvolution are not the deconvnet here;
            empty where they are.
    """

    path: str
    rows: tuple[Step, ...]
    reasons: tuple[str, ...]
    captum_faults: tuple[str, ...]

    def __str__(self) -> str:
        width = max([len(row.op) for row in self.rows], default=0)
        lines = [f"path: {self.path}"]
        lines += [f"  because {reason}" for reason in self.reasons]
        lines += [f"  {r.op:{width}}  {r.path:8}  {r.why:16}  {r.module}" for r in self.rows]
        lines += [f"Captum: {fault}" for fault in self.captum_faults]
        return "\n".join(lines)


def explained(tape: Tape, target: Value, path: str = "auto") -> Explanation:
    """Explains the way back from a value.

    Args:
        tape: The recording.
        target: The layer's output.
        path: What the user asked for: "auto", "rules" or "autograd".
    """
    reasons = tuple(
        why if op.name == "input" else f"{op.where} {why}" for op, why in refusals(tape, target)
    )
    taken = ("autograd" if reasons else "rules") if path == "auto" else path
    steps = []
    for op, output in on_path(tape, target):
        why = why_unsupported(op, output, tape.samples)
        if why is None and op.rule is not None:
            why = op.rule.kind(op) if callable(op.rule.kind) else op.rule.kind
        steps.append(Step(op.name, op.module, taken, why or ""))
    faults = tuple(captum_faults(tape, target))
    if reasons and not faults:
        faults = (f"not checked: {reasons[0]}",)
    return Explanation(taken, tuple(steps), reasons, faults)


def captum_faults(tape: Tape, target: Value) -> Iterable[str]:
    """Where Captum, which hooks ``nn.ReLU`` modules alone, does not rectify the signal, or misplaces it.

    What runs behind the layer is not looked at: there Captum can fail, with an error of its own, on
    a model that autograd cannot differentiate.

    Args:
        tape: The recording.
        target: The layer's output.
    """
    yield from _other_forwards(tape, target)
    path = on_path(tape, target)
    by_module: dict[str, list[Op]] = {}
    for op, _ in path:
        kind = op.rule.kind(op) if op.rule and callable(op.rule.kind) else op.rule and op.rule.kind
        if op.fault is None and (kind in _FOLLOWED or _takes_statistics(op)):
            what = _FOLLOWED.get(str(kind), "what the statistics of a normalisation depend on")
            yield f"other rule at {op.where}: Captum's gradient follows {what}"
        if kind != "rectifier":
            continue
        if op.name != "relu" or op.module not in tape.relus:
            yield f"plain gradient at {op.where}: Captum rectifies nn.ReLU modules only"
            continue
        by_module.setdefault(op.module, []).append(op)
        parent = op.parents[0]
        if parent.op.name == "relu":
            yield f"wrong at {op.where}: it reads what another ReLU returned"
        others = [
            other
            for other, _ in path
            if other is not op and any(p is parent for p in other.parents)
        ]
        if others:
            yield (
                f"wrong at {op.where}: its input also feeds {others[0].where}, and Captum replaces the "
                f"whole gradient of that input"
            )
    for module, calls in by_module.items():
        for later, earlier in pairwise(calls):
            if earlier not in _ancestors(later, constants=False):
                yield f"wrong at {module} (ReLU): it serves parallel branches"
                break
        # Captum keeps one signal a module and puts it at whatever that module read earlier.
        before = {id(op) for call in calls for op in _ancestors(call, constants=False)}
        aside = [op for op in tape.ops if op.name == "relu" and op.module == module]
        if any(
            id(parent.op) in before and op not in calls for op in aside for parent in op.parents
        ):
            yield f"wrong at {module} (ReLU): it also ran on an earlier map, off the way back"


def _other_forwards(tape: Tape, target: Value) -> Iterable[str]:
    """Where Captum looks at another tensor, or its hooks change what the model computes."""
    if tape.call is not None:
        yield "not checked: where a layer runs more than once Captum takes a call of its own choice"
    for module in dict.fromkeys(tape.gradients_off):
        yield (
            f"not checked: {module or 'the model'} turns gradients off, where Captum's gradient stops"
        )
    for op in _ancestors(target.op, constants=True):
        if op.name == "alias" and op.module in tape.relus:
            yield (
                f"wrong at {op.module} (ReLU): it works in place and what it returned is not what is "
                f"read, and under Captum's hooks only what it returns is rectified"
            )
        elif op.name == "alias" and op.fault:
            yield f"not checked: {op.where} {op.fault}"
        elif op.name == "relu" and op.module in tape.relus and op.parents[0].constant:
            yield f"not checked: {op.where} reads what was detached, where Captum has no gradient"


# What Captum's gradient follows and the deconvnet keeps as a constant, by the kind of the rule.
_FOLLOWED = {"gate": "the gate too", "pass-through": "the divisor of contrast normalisation too"}
_NORMS = {"native_layer_norm", "native_group_norm", "rms_norm"}


def _takes_statistics(op: Op) -> bool:
    """Whether an op normalises by mean and variance of its input."""
    if op.name in ("batch_norm", "native_batch_norm"):
        return bool(op.arguments.get("training")) or op["running_var"] is None
    return op.name in _NORMS or bool(op.arguments.get("use_input_stats"))


def _ancestors(op: Op, *, constants: bool) -> list[Op]:
    """An op and those that it was computed from; with ``constants`` also where no gradient flows."""
    found: dict[int, Op] = {}
    waiting = [op]
    while waiting:
        current = waiting.pop()
        if id(current) not in found:
            found[id(current)] = current
            waiting += [p.op for p in current.parents if constants or not p.constant]
    return list(found.values())
