"""What the campaign does to one rank from inside, once its trainer is imported; by environment, for one attempt."""

import importlib.abc
import importlib.machinery
import os
import sys


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls `hurt` on sigma_train.step when that has been imported."""

    def find_spec(self, name, path, target=None):
        if name != "sigma_train.step":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def then_hurt(module):
            execute(module)
            {"nan": nan, "sign": sign}[os.environ["SIGMA_HURT"]](module, int(os.environ["SIGMA_HURT_STEP"]))

        spec.loader.exec_module = then_hurt
        return spec


def nan(one_step, step):
    """The gradients of this step, once."""
    clip, calls = one_step.clip, [0]

    def hurt(model, most):
        calls[0] += 1
        if calls[0] == step:
            next(model.moe_layers()[0].experts.parameters()).grad.mul_(float("nan"))
        return clip(model, most)

    one_step.clip = hurt


def sign(one_step, step):
    """What the expert layer gives in inference, from this step on."""
    import dataclasses
    from importlib import import_module

    backends = import_module("sigma_kernels.backends")
    clip, calls = one_step.clip, [0]

    def counted(model, most):
        calls[0] += 1
        if calls[0] == step:
            for op in ("moe_experts", "moe_experts_inference"):
                (row,) = (row for row in backends._tables[op] if row.name == "cpu")
                backends.register_table(op, [dataclasses.replace(row, run=negated(row.run))])
        return clip(model, most)

    one_step.clip = counted


def negated(run):
    def hurt(*args, **kwargs):
        out = run(*args, **kwargs)
        (out[0] if isinstance(out, tuple) else out).neg_()
        return out

    return hurt


if os.environ.get("SIGMA_HURT") and os.environ.get("RANK") == os.environ.get("SIGMA_HURT_RANK"):
    sys.meta_path.insert(0, AfterImport())
