"""What ends a training run early: one sentence each, and an exit code."""

from __future__ import annotations


class TrainError(Exception):
    """What was asked for cannot be done; the message is one sentence."""

    code = 2
    #: Whether all processes of a run find it at the same time.
    everywhere = False

    @property
    def sentence(self) -> str:
        """The message alone, also where a loader's worker process wrapped it into a traceback."""
        name = f"{type(self).__module__}.{type(self).__qualname__}: "
        return str(self).rsplit(name, 1)[-1].strip()


class NonFiniteLoss(TrainError):
    """Training went wrong: its loss is infinite or not a number."""

    code = 1
    everywhere = True


class Interrupted(TrainError):
    """Somebody ended the run by SIGTERM; its state is saved."""

    code = 128 + 15
    everywhere = True
