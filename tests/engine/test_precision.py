"""The caller's precision is put aside for a picture, and put back."""

from __future__ import annotations

import subprocess
import sys

import torch

# Each setting in a process of its own, as some cannot be undone, forked from one that has torch.
PROGRAM = """
import multiprocessing, warnings
import torch
from lit_deconv.engine.precision import exact

NEW = hasattr(torch.backends, "fp32_precision")
SETTINGS = [
    "pass",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cudnn.benchmark = True",
]
# What somebody may set afterwards: it tells what was set from what follows.
AFTERWARDS = ["pass"]
if NEW:
    SETTINGS += [
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cudnn.fp32_precision = 'tf32'",
        "torch.backends.cudnn.conv.fp32_precision = 'tf32'",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
        "torch.backends.mkldnn.fp32_precision = 'bf16'",
    ]
    AFTERWARDS += [
        "torch.backends.cudnn.fp32_precision = 'ieee'",
        "torch.backends.fp32_precision = 'ieee'",
    ]
READ = [
    "torch.backends.fp32_precision", "torch.backends.cudnn.fp32_precision",
    "torch.backends.mkldnn.fp32_precision", "torch.backends.cudnn.conv.fp32_precision",
    "torch.backends.cudnn.rnn.fp32_precision", "torch.backends.cuda.matmul.fp32_precision",
    "torch.backends.mkldnn.matmul.fp32_precision", "torch.backends.mkldnn.conv.fp32_precision",
    "torch.backends.cudnn.allow_tf32", "torch.backends.cuda.matmul.allow_tf32",
    "torch.get_float32_matmul_precision()", "torch.backends.cudnn.deterministic",
    "torch.backends.cudnn.benchmark",
]

def state():
    found = {}
    for name in READ:
        try:
            found[name] = eval(name)
        except (AttributeError, RuntimeError) as error:
            found[name] = type(error).__name__
    return found

def run(job):
    setting, afterwards, used = job
    warnings.simplefilter("ignore")
    exec(setting)
    before = state()
    if used:
        with exact():
            inside = state()
        assert inside["torch.backends.cudnn.deterministic"], inside
        assert not inside["torch.backends.cudnn.benchmark"], inside
        if NEW:
            assert {v for n, v in inside.items() if "fp32" in n} == {"ieee"}, inside
        else:
            assert inside["torch.backends.cudnn.allow_tf32"] is False, inside
            assert inside["torch.get_float32_matmul_precision()"] == "highest", inside
        assert state() == before, (setting, before, state())
        try:
            with exact():
                raise KeyError
        except KeyError:
            pass
        assert state() == before, (setting, before, state())
    exec(afterwards)
    return state()

with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    jobs = [(s, a, used) for s in SETTINGS for a in AFTERWARDS for used in (True, False)]
    found = pool.map(run, jobs, chunksize=1)
for job, with_it, without_it in zip(jobs[::2], found[::2], found[1::2]):
    assert with_it == without_it, (job, with_it, without_it)
print(len(found) // 2, "settings")
"""


def test_exact_inside_and_as_it_was_afterwards() -> None:
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"{36 if hasattr(torch.backends, 'fp32_precision') else 6} settings\n"
