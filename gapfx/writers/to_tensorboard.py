"""TensorBoard: event files in RUN/tensorboard."""

from __future__ import annotations

from torch.utils.tensorboard import SummaryWriter

from gapfx.writers.points import Points
from gapfx.writers.writer import Opening, Writer

FOLDER = "tensorboard"


class TensorBoard(Writer):
    """Writes event files; a run that goes on adds a file, which tells readers to forget what came after its step."""

    def __init__(self, opening: Opening) -> None:
        super().__init__(opening)
        folder = opening.folder / FOLDER
        is_there = any(folder.glob("events.out.tfevents.*"))
        # Of the step itself a part is written anew, the next phase for example: so all of it is.
        self.replay_from = opening.step if is_there else 0
        # In the first file too: TensorBoard takes the first of these marks for the run's start, and forgets nothing.
        self._writer = SummaryWriter(str(folder), purge_step=self.replay_from)

    def write(self, points: Points) -> None:
        """Add them and flush."""
        for tag, value in points.scalars.items():
            self._writer.add_scalar(tag, value, points.step)
        for tag, text in points.texts.items():
            self._writer.add_text(tag, text, points.step)
        self._writer.flush()

    def close(self, *, is_done: bool) -> None:
        """Close the file."""
        self._writer.close()
