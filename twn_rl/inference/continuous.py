"""Calls that come and go: inputs are read as they arrive, thoughts are written side by side.

What `ReadingPass` is for one call, this is for a server. Inputs that wait together are read
together; those that are to think join a batch of thoughts whenever one of its places is free,
between two tokens. So a thought holds up nobody who does not think for longer than one step takes.
Knows no threads and no network: somebody calls `step` as long as there is work.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor

from twn_rl.inference.batches import collate_usable
from twn_rl.inference.chooser import Chooser
from twn_rl.inference.inputs import InputError
from twn_rl.inference.job import Job
from twn_rl.inference.thought import note_states, written_thought
from twn_rl.inference.thought_pool import Chunk, merge_chunks
from twn_rl.modeling.decoding import Writing
from twn_rl.modeling.kv_prefix import Prefix, merge
from twn_rl.modeling.limits import PromptLimits
from twn_rl.modeling.model import DualLoraModel


@dataclass(eq=False)
class _Thinker:
    """A job that thinks: `row` of what was read with it, and what it has written."""

    job: Job
    chunk: Chunk
    row: int
    writing: Writing
    told: int = 0  # tokens


# Who has ended a thought, or may begin one, waits for others: until they are this share of those
# that are being written, but at most so many tokens.
_SHARE = 4
_PATIENCE_TOKENS = 4


class ContinuousPass:
    """Jobs in, vectors out, with one model; everything happens inside `step`.

    Attributes:
        places: How many thoughts are written at a time.
        batch_size: How many inputs are read at a time.
        inbox: Jobs that have not been read yet.
    """

    def __init__(
        self,
        model: DualLoraModel,
        limits: Callable[[int | None], PromptLimits],
        *,
        batch_size: int = 32,
        places: int = 32,
        max_batch_pixels: int = 1 << 26,
        max_batch_characters: int = 1 << 18,
        note_batch: Callable[[str, int], None] = lambda work, size: None,
    ) -> None:
        """Start with no jobs.

        Args:
            model: The model; its weights must not change.
            limits: Longest thought -> limits of a prompt, see `ThinkingEmbedder.prompt_limits`.
            batch_size: Inputs read at a time.
            places: Thoughts written at a time.
            max_batch_pixels: Pixels read at a time; one input is always read.
            max_batch_characters: Characters read at a time, all inputs counted like the longest.
            note_batch: Told the size of every batch of "read" and "write".
        """
        self.model, self.limits, self.note_batch = model, limits, note_batch
        self.max_batch_pixels, self.max_batch_characters = max_batch_pixels, max_batch_characters
        self.batch_size, self.places = batch_size, places
        self.inbox: deque[Job] = deque()
        self.decoding = model.start_decoding()
        self._waiting: list[_Thinker] = []
        self._writing: list[_Thinker] = []
        self._done: list[Job] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.inbox or self._waiting or self._writing or self._done)

    @property
    def num_writing(self) -> int:
        """How many places are taken."""
        return len(self._writing)

    @property
    def num_waiting(self) -> int:
        """How many inputs have been read and wait for a place."""
        return len(self._waiting)

    def step(
        self,
        take_in: Callable[[], None] = lambda: None,
        *,
        give_out: Callable[[list[Job]], None] | None = None,
        max_tokens: int | None = None,
    ) -> list[Job]:
        """Read what waits, go on with all thoughts, and return the jobs that are done.

        Thoughts are gone on with by one token at least, until there is something better to do: one
        who does not think has come, a job was cancelled, or enough have ended or may begin, for
        whom a few tokens are waited so that they are read together. Jobs that were cancelled leave
        and are returned, too. A job never raises: see `Job.error`.

        Args:
            take_in: Called between two tokens; puts what has come into the inbox.
            give_out: Called with jobs as soon as they are done, which are not returned then: an
                answer does not wait for the rest of the step.
            max_tokens: The most tokens to go on by; None is unlimited.
        """
        with self.model.session():
            self._drop_cancelled()
            self._guarded(self._next_to_read(), self._read)
            self._read_urgent(take_in, give_out)
            self._start()
            self._read_urgent(take_in, give_out)
            ended = self._write(take_in, max_tokens)
            self._read_urgent(take_in, give_out)
            self._guarded([thinker.job for thinker in ended], partial(self._read_out, ended))
            self._give(give_out)
        done, self._done = self._done, []
        return done

    def _give(self, give_out: Callable[[list[Job]], None] | None) -> None:
        if give_out is not None and self._done:
            done, self._done = self._done, []
            give_out(done)

    def _read_urgent(
        self, take_in: Callable[[], None], give_out: Callable[[list[Job]], None] | None
    ) -> None:
        """Read those who do not think and have come since: they wait for one piece of work only."""
        self._give(give_out)
        take_in()
        if any(not job.may_think for job in self.inbox):
            self._guarded(self._next_to_read(only_plain=True), self._read)
            self._give(give_out)

    def _guarded(self, jobs: Sequence[Job], work: Callable[[Sequence[Job]], None]) -> None:
        """Do some jobs' work; an exception is theirs alone, and ends them."""
        if not jobs:
            return
        try:
            work(jobs)
        except Exception as error:  # whatever it is, the next batch must go on
            for job in jobs:
                self._fail(job, error)
            lost = {id(job) for job in jobs}
            self.decoding.leave([t.writing for t in self._writing if id(t.job) in lost])
            self._writing = [t for t in self._writing if id(t.job) not in lost]
            self._waiting = [t for t in self._waiting if id(t.job) not in lost]

    def _fail(self, job: Job, error: Exception) -> None:
        if job.done_at is None:
            job.error = error
        self._finish(job)

    def _finish(self, job: Job) -> None:
        if job.done_at is not None:
            return
        job.done_at = time.perf_counter()
        self._done.append(job)

    def _drop_cancelled(self) -> None:
        gone = [job for job in self.inbox if job.is_cancelled]
        if gone:
            self.inbox = deque(job for job in self.inbox if not job.is_cancelled)
        leaving = [thinker for thinker in self._writing if thinker.job.is_cancelled]
        if leaving:
            self.decoding.leave([thinker.writing for thinker in leaving])
            self._writing = [t for t in self._writing if not t.job.is_cancelled]
        gone += [t.job for t in self._waiting if t.job.is_cancelled]
        self._waiting = [t for t in self._waiting if not t.job.is_cancelled]
        for job in (*gone, *(thinker.job for thinker in leaving)):
            self._finish(job)

    def _next_to_read(self, *, only_plain: bool = False) -> list[Job]:
        """Take the jobs that are read next: who cannot think first, all of one longest prompt.

        What was read of a thinker fills memory until it has a place, so at most `places` wait.
        """
        room = 0 if only_plain else self.places - len(self._waiting)
        ready = [job for job in self.inbox if not job.may_think]
        ready += [job for job in self.inbox if job.may_think][: max(0, room)]
        same = [job for job in ready if self._kind(job) == self._kind(ready[0])]
        chosen = same[: self._fitting(same[: self.batch_size])]
        taken = {id(job) for job in chosen}
        self.inbox = deque(job for job in self.inbox if id(job) not in taken)
        return chosen

    def _fitting(self, jobs: Sequence[Job]) -> int:
        """Return how many of these jobs, from the first on, are read in one batch."""
        pixels = longest = 0
        for number, job in enumerate(jobs):
            pixels += job.pixels
            longest = max(longest, job.characters)
            padded = longest * (number + 1)
            if number and (pixels > self.max_batch_pixels or padded > self.max_batch_characters):
                return number
        return len(jobs)

    def _kind(self, job: Job) -> int | None:
        return self.limits(job.max_think_tokens).max_length

    def _read(self, jobs: Sequence[Job]) -> None:
        """Give jobs their no-think vectors; those that do not think are done."""
        self.note_batch("read", len(jobs))
        limits = self.limits(jobs[0].max_think_tokens)
        items = dict(enumerate(job.item for job in jobs))
        batch, fitted, errors = collate_usable(
            self.model.backbone, self.model.renderer, items, limits
        )
        for error in errors:
            self._fail(jobs[error.position], error)
        if not fitted:
            return
        read = [jobs[position] for position in fitted]
        tokens = batch["attention_mask"].sum(1).tolist()
        for job, item, count in zip(read, fitted.values(), tokens, strict=True):
            job.prompt_tokens, job.is_truncated = int(count), item.text != job.item.text
        latent = {job.chooser.is_latent for job in read}
        if len(latent) == 1 and not any(job.may_think for job in read):
            # One pass is cheaper than two where nothing goes on from the prompt.
            self._settle(read, self.model.embed(batch, is_latent=latent.pop()), None)
            return
        is_policy_asked = any(job.chooser.is_policy for job in read)
        start, prefix = self.model.read_both(self.model.prepare(batch), is_started=is_policy_asked)
        chunk = Chunk(list(range(len(read))), [""] * len(read), start, prefix)
        self._settle(read, self._states(read, prefix), chunk)

    def _states(self, jobs: Sequence[Job], prefix: Prefix) -> Tensor:
        """Return the no-think states (N, D): with a latent thought where that is wanted."""
        states = torch.zeros(len(jobs), self.model.hidden_size)
        for is_latent in {job.chooser.is_latent for job in jobs}:
            rows = [n for n, job in enumerate(jobs) if job.chooser.is_latent == is_latent]
            found = self.model.read_out(prefix.select(rows), is_latent=is_latent)
            states[rows] = found.float().cpu()
        return states

    def _settle(self, jobs: Sequence[Job], states: Tensor, chunk: Chunk | None) -> None:
        """Note states (N, D) and decide who thinks."""
        now = time.perf_counter()
        probabilities = self._probabilities(jobs, states, chunk)
        thinkers: list[int] = []
        rows = zip(jobs, states.float().cpu(), probabilities, strict=True)
        for row, (job, state, probability) in enumerate(rows):
            job.probability, job.read_at = probability, now
            problem = _problem(job.chooser, state, probability)
            if problem is not None:
                self._fail(job, InputError(0, problem))
                continue
            job.state = job.no_think_state = state.numpy()
            thinks = job.chooser.thinks(0, probability)
            if job.on_read is not None:
                job.on_read(job, thinks)
            if thinks:
                thinkers.append(row)
            else:
                self._finish(job)
        if thinkers and chunk is not None:
            self._wait(jobs, chunk, thinkers)

    def _probabilities(
        self, jobs: Sequence[Job], states: Tensor, chunk: Chunk | None
    ) -> list[float | None]:
        """Return what gates or the policy say of each job; None where nobody is asked."""
        found: dict[int, float] = {}
        asked = [row for row, job in enumerate(jobs) if job.chooser.entries is None]
        for gate in {jobs[row].chooser.gate for row in asked}:
            rows = [row for row in asked if jobs[row].chooser.gate == gate]
            if gate is not None:
                said = gate(states[rows].to(self.model.device))
            else:
                assert chunk is not None
                assert isinstance(chunk.start, Prefix)
                said = self.model.think_probability(chunk.start.select(rows))
            found |= dict(zip(rows, said.float().tolist(), strict=True))
        return [found.get(row) for row in range(len(jobs))]

    def _wait(self, jobs: Sequence[Job], chunk: Chunk, rows: Sequence[int]) -> None:
        for row in rows:
            job = jobs[row]
            budget = job.max_think_tokens or self.model.config.max_think_tokens
            own, place = (chunk.select([row]), 0) if chunk.is_mergeable else (chunk, row)
            self._waiting.append(_Thinker(job, own, place, Writing(budget)))

    def _start(self) -> None:
        """Give free places to those who wait longest."""
        while self._waiting and len(self._writing) < self.places:
            starting = self._waiting[:1]
            if starting[0].chunk.is_mergeable:
                free = self._waiting[: self.places - len(self._writing)]
                starting = list(takewhile(lambda thinker: thinker.chunk.is_mergeable, free))
            elif self._writing and not starting[0].chunk.prefix.is_mergeable:
                return  # caches that drop keys are written from one at a time
            self._waiting = self._waiting[len(starting) :]
            self._guarded([t.job for t in starting], partial(self._join, starting))

    def _join(self, thinkers: Sequence[_Thinker], _: Sequence[Job]) -> None:
        chunk, rows = thinkers[0].chunk, [thinkers[0].row]
        if len(thinkers) > 1:
            chunk = merge_chunks([thinker.chunk for thinker in thinkers])
            rows = list(range(len(thinkers)))
        prefix = self.model.start_reasoning(chunk.start, rows)
        self.decoding.join(prefix, [thinker.writing for thinker in thinkers])
        self._writing += thinkers

    def _write(self, take_in: Callable[[], None], max_tokens: int | None) -> list[_Thinker]:
        """Go on with all thoughts; return those that have ended."""
        ended: list[Writing] = []
        tokens = waited = 0
        try:
            with self.model.writing():
                while self.decoding.rows and tokens != max_tokens:
                    self.note_batch("write", len(self.decoding))
                    ended += self.decoding.step()
                    tokens += 1
                    self._tell_tokens()
                    take_in()
                    pending = len(ended) + self._num_beginners()
                    waited += bool(pending)
                    share = pending * _SHARE >= len(self.decoding)
                    if self._is_urgent() or waited >= _PATIENCE_TOKENS or (pending and share):
                        break
        except Exception as error:  # the batch of thoughts is lost, nothing else
            self.decoding = self.model.start_decoding()
            for thinker in self._writing:
                self._fail(thinker.job, error)
            self._writing = []
            return []
        have_ended = {id(writing) for writing in ended}
        finished = [t for t in self._writing if id(t.writing) in have_ended]
        self._writing = [t for t in self._writing if id(t.writing) not in have_ended]
        return finished

    def _tell_tokens(self) -> None:
        """Tell those who listen what has been written, once for each token."""
        for thinker in self._writing:
            listener, ids = thinker.job.on_token, thinker.writing.ids
            if listener is not None and len(ids) > thinker.told:
                thinker.told = len(ids)
                listener(thinker.job, ids)

    def _is_urgent(self) -> bool:
        """Whether somebody has come who does not think, or somebody has left."""
        jobs = (*self.inbox, *(t.job for t in self._writing))
        return any(job.is_cancelled for job in jobs) or any(not j.may_think for j in self.inbox)

    def _num_beginners(self) -> int:
        """Return how many that may think could be read now."""
        return max(0, min(len(self.inbox), self.places - len(self._waiting)))

    def _read_out(self, thinkers: Sequence[_Thinker], _: Sequence[Job]) -> None:
        """Replace the no-think vectors of those whose thought is usable."""
        for thinker in thinkers:
            thinker.job.thought = written_thought(self.model, thinker.writing.ids)
        usable = [t for t in thinkers if t.job.has_thought]
        if usable:
            prefix = merge([t.chunk.prefix.select([t.row]) for t in usable])
            states = self.model.read_out(prefix, [t.job.thought_ids for t in usable])
            for thinker, state in zip(usable, states.float().cpu(), strict=True):
                _note(thinker.job, state)
        for thinker in thinkers:
            self._finish(thinker.job)


def _note(job: Job, state: Tensor) -> None:
    """Take over the state (D,) with the thought, if that is used."""
    assert job.thought is not None
    assert job.no_think_state is not None
    without, chooser = torch.from_numpy(job.no_think_state)[None], job.chooser
    note_states([job.thought], state[None], without, judge=chooser.judge, keep=chooser.keep)
    if job.thought.state is not None:
        job.state = job.thought.state.numpy()


def _problem(chooser: Chooser, state: Tensor, probability: float | None) -> str | None:
    """Return what makes a vector or a decision unusable."""
    if not torch.isfinite(state).all():
        return (
            f"its vector holds NaN or infinity (type {state.dtype}); expected finite numbers; "
            "load the model with dtype='float32' and check the checkpoint"
        )
    if probability is not None and not 0.0 <= probability <= 1.0:
        who = "policy" if chooser.is_policy else "gate"
        return f"{who} probability = {probability}; expected in [0, 1]; train the {who} again"
    return None
