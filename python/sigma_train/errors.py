"""How a command ends badly: one sentence and an exit code, decided here for every command."""

import re
import signal

LACK_OF_MEMORY = re.compile("can't allocate memory|not enough memory|Storage size calculation overflowed")

EXTRAS = {"triton": "triton", "transformers": "hf"} | dict.fromkeys(
    ("pyarrow", "ruptures", "scipy"), "noise"
)  # else train


class WrongInput(ValueError):
    """Settings, files or arguments that the user can mend, in one sentence; exit code 2."""


class Failure(RuntimeError):
    """A run or a machine that failed, in one sentence; exit code 1."""


class LostRank(Failure):
    """Another rank died or hangs: a run may go on from its checkpoint; exit code 3."""


class Stopped(BaseException):
    """A signal where there is nothing to save; exit code 128 + its number, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} before the work was done")
        self.number = number


def verdict(error: BaseException) -> tuple[int, str] | None:
    """Exit code and sentence; None for what nobody foresaw, which deserves its traceback."""
    text = " ".join(str(error).split())
    match error:
        case Stopped():
            return 128 + error.number, text
        case WrongInput():
            return 2, text
        case LostRank():
            return 3, text
        case Failure():
            return 1, text
        case RuntimeError() | ValueError() if text.startswith("SIGMA_"):  # sigma_kernels, of its environment
            return 2, text
        case MemoryError() | RuntimeError() if isinstance(error, MemoryError) or LACK_OF_MEMORY.search(text):
            wanted = re.search(r"\d+ bytes", text)
            what = f"{wanted[0]} at once" if wanted else "this"
            return 1, f"not enough memory for {what}; lower the sizes of [model] or train.batch_size"
        case ModuleNotFoundError() if error.name and not error.name.startswith("sigma_"):
            extra = EXTRAS.get(error.name.partition(".")[0], "train")
            return (
                1,
                f"the module {error.name} is not installed; pip install 'sigma-kernels[{extra}]' brings it",
            )
        case OSError():
            return 1, f"{error.filename}: {error.strerror}" if error.filename else error.strerror or text
    return None
