"""Reasoning for the records of a manifest: from measured facts, or by a multimodal model with quality assurance."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from tqdm import tqdm

from lab.data import prompts
from lab.data.endpoint import Endpoint, ReplyCache, Unanswered, check_url, is_plain
from lab.data.facts import Facts, measure
from lab.data.images import ImageError, load_sample
from lab.data.manifest import Derived, read_manifest, replace_lines
from lab.data.quality import PASS_SCORE, clean, find_faults, overall_score, parse_scores, refuses
from lab.data.reasoning import parse_claims, write
from lab.data.sample import Record, Sample, evenly
from lab.errors import LabError

REWRITES = 3
"""How often a sample is written again before it is rejected (CORE-Seg: at most three times)."""
JUDGE_ASKED = 3
"""How often a judge is asked before its reply counts as unreadable."""
SILENT = 10
"""So many samples without an answer in a row end a run."""


@dataclass
class Outcome:
    """How one record ended."""

    id: str
    state: str = "written"
    """written, rejected, or unanswered: the next start asks again."""
    reason: str = ""
    """Why it is not written."""
    rewrites: int = 0
    claims: int = 0
    """Claims in the reasoning; all of them agree with the measured facts."""
    score: float | None = None
    """The judge's last, 0..1."""
    scores: dict[str, float] = field(default_factory=dict)
    reasoning: str = ""


@dataclass(frozen=True)
class Service:
    """An endpoint that images are sent to, and what it is expected to cost.

    Raises:
        LabError: A URL or a number that cannot be used, or no model.
    """

    url: str
    model: str
    judge: str
    """Model that scores; empty: none does."""
    concurrency: int
    per_minute: float
    timeout: float
    price_in: float
    """US dollars for a million tokens."""
    price_out: float
    tokens_in: int
    """Of one call, images included."""
    tokens_out: int
    seconds: float
    """Of one call."""

    def __post_init__(self) -> None:
        check_url(self.url)
        if not self.model:
            raise LabError("--endpoint needs a --model; name one that it serves")
        if self.concurrency < 1 or self.timeout <= 0 or self.per_minute < 0:
            raise LabError("--concurrency is below 1, --timeout not above 0 or --per_minute negative; change it")

    def estimate(self, records: int, remembered: int) -> str:
        """Calls, cost and time, from all is well at once to every sample written four times."""
        least = records * (3 if self.judge else 2)
        most = least + records * REWRITES * (2 if self.judge else 1)
        price = (self.tokens_in * self.price_in + self.tokens_out * self.price_out) / 1e6
        pace = max(self.seconds / self.concurrency, 60 / self.per_minute if self.per_minute else 0)
        cost = f"{least * price:.2f} to {most * price:.2f} US dollars" if price else "a price that flags did not tell"
        plain = ", UNENCRYPTED" if is_plain(self.url) else ""
        return (
            f"{records} images go to {self.url}{plain}: {least} to {most} calls, {cost}, "
            f"{least * pace / 60:.1f} to {most * pace / 60:.1f} minutes; {remembered} replies are paid already"
        )

    def bill(self, endpoint: Endpoint) -> str:
        """What a run came to."""
        used = endpoint.usage
        cost = (used.tokens_in * self.price_in + used.tokens_out * self.price_out) / 1e6
        return (
            f"{used.paid} calls paid ({used.tokens_in} tokens in, {used.tokens_out} out, {cost:.4f} US dollars), "
            f"{used.remembered} from the cache, {used.requests - used.paid} requests sent again or lost"
        )


def write_reasoning(
    out: Derived, service: Service | None, *, limit: int = 0, seed: int = 0, dry_run: bool = False
) -> str:
    """Write a manifest with reasoning, beside the one it is made from.

    Besides, OUT.outcomes.jsonl tells how every record ended, and OUT.calls.jsonl keeps the replies of an endpoint: a
    run that was stopped repeats none of them.

    Args:
        out: The manifest, and where the other one is to be written.
        service: None writes from measured facts, and nothing is sent.
        limit: Only this many records, evenly spread; 0 takes all.
        seed: Of the phrasings.
        dry_run: Only estimate.

    Returns:
        The counts, in words.

    Raises:
        LabError: A manifest or endpoint that cannot be used; records that are still unanswered; none written.
    """
    records = evenly(read_manifest(out.manifest), limit)
    if service is None:
        if dry_run:
            return f"{len(records)} records would be written from facts; nothing is sent"
        bar = tqdm(records, desc="reasoning", unit="record")
        outcomes = [from_facts(record, seed) for record in bar]
    else:
        with ReplyCache(out.path.with_suffix(".calls.jsonl")) as cache:
            print(service.estimate(len(records), len(cache.replies)))
            if dry_run:
                return "dry run: nothing was sent"
            outcomes = asyncio.run(_ask_for_all(records, service, cache))
    return _finish(out, records, outcomes)


def from_facts(record: Record, seed: int) -> Outcome:
    """Reasoning from what is measured; the same record and seed give the same phrasing in any manifest."""
    try:
        sample = load_sample(record)
    except ImageError as error:
        return Outcome(record.id, "rejected", str(error))
    facts = measure(sample.image, sample.mask)
    digest = hashlib.sha256(f"{seed} {record.id}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    text = write(facts, record.modality, record.anatomy, record.lesion, rng)
    if faults := find_faults(text, record, facts):
        return Outcome(record.id, "rejected", " ".join(faults))
    return Outcome(record.id, claims=len(parse_claims(text)), reasoning=text)


class _Rejected(Exception):
    pass


@dataclass
class Author:
    """Writes with a model in two steps, checks, has it judged, and lets it write again."""

    endpoint: Endpoint
    model: str
    judge: str = ""

    async def write(self, record: Record) -> Outcome:
        """Reasoning for one record; `LabError` when asking for others is of no use either."""
        outcome = Outcome(record.id)
        try:
            sample = await asyncio.to_thread(load_sample, record)
            facts = await asyncio.to_thread(measure, sample.image, sample.mask)
            outcome.reasoning = await self._in_two_steps(sample, facts, outcome)
            outcome.claims = len(parse_claims(outcome.reasoning))
        except (ImageError, _Rejected) as error:
            outcome.state, outcome.reason = "rejected", str(error)
        except Unanswered as error:
            outcome.state, outcome.reason = "unanswered", str(error)
        return outcome

    async def _in_two_steps(self, sample: Sample, facts: Facts, outcome: Outcome) -> str:
        async def describes(text: str) -> list[str]:
            return ["It is a refusal or empty; describe this research image."] if refuses(text) or not text else []

        async def reasons(text: str) -> list[str]:
            faults = find_faults(text, sample.record, facts)
            return faults if faults or not self.judge else await self._judged(sample, facts, text, outcome)

        description = await self._until(describes, prompts.describe_messages(sample, facts), outcome)
        return await self._until(reasons, prompts.reason_messages(sample, facts, description), outcome)

    async def _until(
        self, inspect: Callable[[str], Awaitable[list[str]]], messages: list[dict], outcome: Outcome
    ) -> str:
        """Ask, and ask again with what is wrong, until `inspect` finds no fault."""
        while True:
            reply = await self.endpoint.ask(self.model, messages)
            text = clean(reply.text)
            faults = [reply.problem] if reply.problem else await inspect(text)
            if not faults:
                return text
            if outcome.rewrites == REWRITES:
                raise _Rejected(" ".join(faults))
            outcome.rewrites += 1
            messages = prompts.again(messages, reply.text, faults)

    async def _judged(self, sample: Sample, facts: Facts, text: str, outcome: Outcome) -> list[str]:
        messages = prompts.judge_messages(sample, facts, text)
        for _ in range(JUDGE_ASKED):
            reply = await self.endpoint.ask(self.judge, messages)
            try:
                outcome.scores = parse_scores(reply.text)
            except ValueError as error:
                problem = reply.problem or f"{error}."
                messages = prompts.again(messages, reply.text, [f"{problem} Reply with the JSON object alone."])
                continue
            outcome.score = overall_score(outcome.scores)
            low = outcome.score < PASS_SCORE
            return [prompts.low_score(outcome.score, outcome.scores, reply.text)] if low else []
        raise _Rejected(f"The judge '{self.judge}' gave no scores that can be read, {JUDGE_ASKED} times: {problem}")


async def _ask_for_all(records: list[Record], service: Service, cache: ReplyCache) -> list[Outcome]:
    outcomes, todo, counts, silent = [], iter(records), Counter(), 0

    async def work(author: Author, bar: tqdm) -> None:
        nonlocal silent
        for record in todo:
            outcome = await author.write(record)
            outcomes.append(outcome)
            counts[outcome.state] += 1
            silent = silent + 1 if outcome.state == "unanswered" else 0
            if silent == SILENT:
                raise LabError(f"{SILENT} records in a row got no answer ({outcome.reason}); run it again later")
            bar.set_postfix(counts, refresh=False)
            bar.update()

    endpoint = Endpoint(service.url, cache, service.timeout, service.per_minute)
    author = Author(endpoint, service.model, service.judge)
    try:
        async with endpoint:
            with tqdm(total=len(records), desc="reasoning", unit="record") as bar:
                workers = [asyncio.create_task(work(author, bar)) for _ in range(service.concurrency)]
                try:
                    await asyncio.gather(*workers)
                finally:
                    for worker in workers:
                        worker.cancel()
    finally:
        print(service.bill(endpoint))
    return outcomes


def _finish(out: Derived, records: Sequence[Record], outcomes: list[Outcome]) -> str:
    """Write the manifest and the outcomes, in the manifest's order, and count."""
    found = {outcome.id: outcome for outcome in outcomes}
    told = out.path.with_suffix(".outcomes.jsonl")
    replace_lines(told, (json.dumps(asdict(found[record.id])) for record in records))
    kept = {outcome.id: {"reasoning": outcome.reasoning} for outcome in outcomes if outcome.state == "written"}
    states = Counter(outcome.state for outcome in outcomes)
    counts = ", ".join(f"{states[state]} {state}" for state in ("written", "rejected", "unanswered"))
    counts = f"{len(outcomes)} records: {counts}; {sum(outcome.rewrites for outcome in outcomes)} rewrites"
    if not kept:
        raise LabError(f"{counts}; no manifest was written, see '{told}'")
    out.write(kept)
    if states["unanswered"]:
        raise LabError(f"{counts}; in '{out.path}' and '{told}'; run the same command again for the unanswered ones")
    return f"{counts}, in {out.path} and {told.name}"
