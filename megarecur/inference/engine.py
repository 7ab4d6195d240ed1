"""The inference engine: many requests over one model, batched by depth.

    engine = Engine(model, num_pages=256)
    handle = engine.submit(Request(tokens=(1, 2, 3), max_new_tokens=20))
    engine.run()
    ids = [event.token for event in handle if event.token is not None]

The unit of work is one pass over a group of the layer map (a loop's core, a cycle's blocks, a
ring's block, prelude, coda) for all items that wait for it, whatever their loop, request or
position: continuous depth-wise batching (Bae et al. 2025, section 3.4). `step` runs one pass,
or several of the same items if nothing happens between them.
Requests may be submitted and cancelled by any thread; one thread steps.

Models that keep no keys and values of every token (halting, temporal memory) are served one token
at a step, without batches (`plain.PlainTexts`), under the same limits.

Shapes: R rows, S rows of an item, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import cast

import torch
from torch import Tensor

from megarecur.config.recurrence import Looped
from megarecur.errors import ConfigError
from megarecur.inference.early import Kind, decide_exits
from megarecur.inference.generate import check_options, choose
from megarecur.inference.graphs import CudaCapture, Graphs
from megarecur.inference.passes import Item, Passes
from megarecur.inference.plain import PlainTexts
from megarecur.inference.request import (
    Counts,
    Event,
    Handle,
    Reason,
    Request,
    Score,
    count_pages,
    find_route,
    refuse_draft,
    refuse_exit,
    score_tokens,
)
from megarecur.inference.scheduler import Scheduler, Text
from megarecur.inference.visits import Group
from megarecur.model.transformer import Transformer
from megarecur.recurrence.depth import default_depth
from megarecur.recurrence.schemes import layer_map


class Engine:
    """A model that serves requests.

    Args:
        model: the whole model, or with tensor parallelism this rank's part; then all ranks make the
            same calls.
        num_pages: pages of the pool of keys and values.
        page_size: tokens of a page.
        max_texts: maximum number of texts that run at a time.
        chunk: maximum tokens of a prompt in one pass.
        max_rows: maximum tokens of all texts in one pass.
        max_loops: most loops of a request, if the scheme has loops; None: the trained number.
        missing_ids: ids never chosen: rows of the vocabulary without a piece of the tokenizer.
        cuda_graphs: on CUDA, capture passes with one row per text, and replay them (`graphs`).
            Without effect on other devices and with tensor parallelism.

    Raises:
        ConfigError: sizes below 1, a model that continues no text, or a part of a pipeline.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        num_pages: int = 256,
        page_size: int = 16,
        max_texts: int = 64,
        chunk: int = 128,
        max_rows: int = 512,
        max_loops: int | None = None,
        missing_ids: Collection[int] = (),
        cuda_graphs: bool = True,
    ) -> None:
        config = model.config
        sizes = {"num_pages": num_pages, "page_size": page_size, "max_texts": max_texts,
                 "chunk": chunk, "max_rows": max_rows}  # fmt: skip
        problems = [
            f"{name}={n} must be at least 1; raise it" for name, n in sizes.items() if n < 1
        ]
        if model.embedding is None or model.head is None or len(model.blocks()) < 1:
            problems.append("the engine needs the whole model, not a pipeline stage; set "
                            "parallel.pipeline to 1")  # fmt: skip
        if problems:
            raise ConfigError("cannot serve:" + "".join(f"\n  {line}" for line in problems))
        self.model, self.config, self.chunk = model, config, chunk
        self.missing = frozenset(missing_ids)
        self.max_loops, self.max_texts = max_loops, max_texts
        self.usual_loops: int | None = None
        """Loops of a request without a depth, if the scheme has loops."""
        if isinstance(config.recurrence, Looped):
            self.usual_loops = default_depth(config.recurrence).num_loops
            self.max_loops = max_loops or self.usual_loops
        self.counts = Counts()
        self.inbox: SimpleQueue[Handle] = SimpleQueue()
        self.lock, self.number = threading.Lock(), 0
        self.num_pages, self.page_size = num_pages, page_size
        self.passes: Passes | None = None
        self.plain = PlainTexts(model, max_texts, num_pages, page_size, self.missing)
        if config.halting is None and config.temporal is None and not self.refuse_model():
            steps = layer_map(config.recurrence, self.max_loops)
            self.passes = Passes(model, steps, num_pages, page_size)
            if cuda_graphs and self.passes.device.type == "cuda" and model.tp.size == 1:
                self.passes.graphs = Graphs(self.passes, steps, max_texts, CudaCapture())
            self.scheduler = Scheduler(self.passes.pool, max_texts, max_rows)

    @property
    def num_waiting(self) -> int:
        """Number of texts that wait for pages; any thread may read it."""
        return self.inbox.qsize() + len((self.scheduler if self.passes else self.plain).waiting)

    @property
    def num_running(self) -> int:
        """Number of texts that run; any thread may read it."""
        return len((self.scheduler if self.passes else self.plain).running)

    # ------------------------------------------------------------------------------- requests

    def submit(self, request: Request) -> Handle:
        """Accept a request; any thread may call this.

        Raises:
            ConfigError: options out of range, ids unknown to the model, a depth without
                parameters, or a text that exceeds the pool.
        """
        self.check(request)
        with self.lock:
            handle = Handle(request, self.number)
            self.number += 1
            self.inbox.put(handle)
        return handle

    def refuse_model(self) -> str:
        """Return why the model continues no text; "" if it does."""
        config = self.config
        if config.encoder is not None or config.classifies:
            return "the run continues no text"
        return ""

    def check(self, request: Request) -> None:
        """Reject an invalid request; all mistakes are lines of one ConfigError."""
        problems = []
        if request.exit is not None:
            problems.append(refuse_exit(request.exit, self.config, request.num_loops))
        if request.draft is not None:
            problems.append(refuse_draft(request, self.config))
        if request.logprobs is not None and request.logprobs < 0:
            problems.append(f"logprobs={request.logprobs} must be at least 0; raise it")
        loops, most = request.num_loops or self.usual_loops, self.max_loops
        if loops is not None and most is not None and loops > most:
            problems.append(
                f"depth {loops}: the engine has room for {most} loops; set the depth to at most "
                f"{most}, or raise max_loops"
            )
        if request.max_new_tokens > 0:
            needed = count_pages(request.most_tokens, self.page_size)
            if needed > self.num_pages:
                problems.append(
                    f"{len(request.tokens)} tokens of prompt and max_new_tokens="
                    f"{request.max_new_tokens} need {needed} pages, more than num_pages="
                    f"{self.num_pages}; shorten the request, or raise num_pages"
                )
        check_options(
            self.config, request.tokens, request.max_new_tokens, request.temperature,
            request.top_k, request.top_p, request.num_loops,
            "\n  ".join(problem for problem in problems if problem),
        )  # fmt: skip

    def receive(self) -> None:
        """Take new requests, and end cancelled ones."""
        while True:
            try:
                handle = self.inbox.get_nowait()
            except Empty:
                break
            if self.passes is None:
                self.plain.receive(handle)
            else:
                self.scheduler.wait(self.begin(handle))
        if self.passes is not None:
            for text in [*self.scheduler.waiting, *self.scheduler.running]:
                if text.handle.cancelled.is_set():
                    self.end(text, "cancelled")

    def begin(self, handle: Handle) -> Text:
        """Return the text of a request."""
        assert self.passes is not None
        request, pool = handle.request, self.passes.pool
        route = find_route(self.config, request.num_loops)
        depends: list[object] = [request.num_loops]
        if getattr(self.config.recurrence, "initial_state", "") == "random":
            depends += [request.seed, request.sample]
        if self.passes.is_dynamic:
            depends.append(len(request.tokens))
        size = count_pages(request.most_tokens, pool.page_size)
        table = torch.zeros(size, dtype=torch.long, device=pool.keys.device)
        return Text(handle, route, table, repr(depends).encode(), list(request.tokens))

    def end(self, text: Text, reason: Reason) -> None:
        """End a text."""
        self.scheduler.end(text)
        text.handle.events.put(Event(reason=reason))

    # ---------------------------------------------------------------------------------- steps

    def run(self) -> None:
        """Step until no request is left."""
        while self.step():
            pass

    @torch.inference_mode()
    def step(self) -> bool:
        """Run one pass, and further passes of the same items while they decide nothing and no other
        text runs or waits; returns False if there was nothing to do."""
        self.receive()
        if self.passes is None:
            return self.plain.step(self.counts)
        scheduler = self.scheduler
        scheduler.admit()
        for text in sorted(scheduler.running, key=lambda text: text.handle.number):
            # An older text may have taken its pages.
            if text.item is None and text in scheduler.running:
                self.make_item(text)
        texts = scheduler.next_batch(patience=2 * max(
            [len(text.route.visits) for text in scheduler.running], default=1
        ))  # fmt: skip
        if not texts:
            return bool(scheduler.waiting)
        items = [cast(Item, text.item) for text in texts]
        while True:
            self.fill(texts)
            self.passes.run(items)
            self.counts.passes += 1
            self.counts.rows += sum(len(item.positions) for item in items)
            if not self.repeats_pass(texts):
                break
            scheduler.passes += 1
        for text in texts:
            text.waited = scheduler.passes
        self.advance(texts)
        return True

    def repeats_pass(self, texts: Sequence[Text]) -> bool:
        """Return True if the next pass is one of the same items, before which nothing happens."""
        waits = self.scheduler.waiting or not self.inbox.empty()
        if waits or len(texts) < len(self.scheduler.running):
            return False
        items = [find_item(text) for text in texts]
        if any(item.index == len(item.visits) for item in items):
            return False
        group = items[0].visit.group
        return not any(
            item.visit.group != group or may_leave_loops(text) or text.handle.cancelled.is_set()
            for text, item in zip(texts, items, strict=True)
        )

    def make_item(self, text: Text) -> None:
        """Give a text its next item: a chunk of known tokens, or a drafted token."""
        request, begin = text.request, text.computed
        drafts = self.drafts(text)
        if drafts:
            begin += len(text.shallow)
            tokens = [text.proposals[-1] if text.proposals else text.tokens[-1]]
        else:
            stop = min(begin + self.chunk, len(text.tokens))
            if request.exit is not None and text.num_new and begin < len(text.tokens) - 1:
                # The new token may exit, so it runs alone.
                stop = min(stop, len(text.tokens) - 1)
            tokens = text.tokens[begin:stop]
        if not self.scheduler.reserve(text, begin + len(tokens)):
            return
        text.waited, text.mode = self.scheduler.passes, "draft" if drafts else "known"
        text.item = Item(
            tokens, list(range(begin, begin + len(tokens))), text.table, len(request.tokens),
            request.seed, request.sample, text.route.visits,
        )  # fmt: skip

    def drafts(self, text: Text) -> bool:
        """Return True if the next token of a text is drafted."""
        left = text.request.max_new_tokens - text.num_new
        at_end = text.computed == len(text.tokens) - 1 and text.num_new > 0
        return text.request.draft is not None and at_end and left > 1

    def advance(self, texts: Sequence[Text]) -> None:
        """Decide what follows a pass: exits, new tokens, or the next pass."""
        for text in texts:
            if may_leave_loops(text):
                self.send_to_coda(text)
        logits = self.read_logits(texts)
        self.score_prompts(logits)
        leaving = self.find_leaving(texts, logits)
        complete = dict[Text, int]()
        for text in texts:
            item = find_item(text)
            if item.index < len(item.visits) or text.mode == "draft":
                continue
            if text.judged is not None:
                before, text.judged = text.judged, None
                if text not in leaving:
                    text.item = before
                    del logits[text]
                    continue
                text.exited_after = count_loops(before)
                text.fill_later(before)
            if text.trail and not text.exited_after and self.consult_oracle(text, logits):
                continue
            complete[text] = text.exited_after or text.route.num_loops
            if text.exited_after:
                text.exits[item.positions[-1]] = text.exited_after
        chosen = self.choose_tokens(logits, complete)
        for text, tokens in chosen.items():
            if text.mode == "draft":
                self.propose(text, tokens[0])
        for text, loops in complete.items():
            tokens, count = chosen.get(text, []), text.request.logprobs
            scores: Sequence[Score | None] = [None] * len(tokens)
            if count is not None and tokens:
                scores = score_tokens(logits[text], tokens, count, self.missing)
            self.complete(text, loops, tokens, scores)

    def send_to_coda(self, text: Text) -> None:
        """Send tokens that may exit after a pass to the visits after the loops: a drafted token, a
        new one that leaves or is judged, and known ones that left here before."""
        item, exit_, after = find_item(text), text.request.exit, text.route.coda
        if text.mode == "draft":
            text.shallow.append(item)
            text.item = at_visit(item, after)
        elif item.positions[-1] < len(text.tokens) - 1:
            self.split_exited(text, count_loops(item))
        elif exit_ is not None and exit_.kind == "loop":
            text.exited_after, text.item = count_loops(item), at_visit(item, after)
            text.fill_later(item)
        else:
            text.judged, text.item = item, at_visit(item, after)

    def read_logits(self, texts: Sequence[Text]) -> dict[Text, Tensor]:
        """Return logits [S, V] of the rows that need them now, by text."""
        assert self.passes is not None
        wanted = [(text, count) for text in texts if (count := count_read(text))]
        if not wanted:
            return {}
        states = [cast(Tensor, find_item(text).x_SD)[-count:] for text, count in wanted]
        logits_RV = self.passes.logits(torch.cat(states))
        parts = logits_RV.split([count for _, count in wanted])
        return {text: part for (text, _), part in zip(wanted, parts, strict=True)}

    def score_prompts(self, logits: dict[Text, Tensor]) -> None:
        """Score prompts, and leave of their logits those of the next token."""
        for text, logits_SV in list(logits.items()):
            request, scores = text.request, text.handle.prompt_scores
            if text.num_new or not request.score_prompt:
                continue
            item = find_item(text)
            # The row at position p scores token p + 1. A preempted prompt passes again.
            first = len(scores) - item.positions[0]
            following = request.tokens[len(scores) + 1 : item.positions[-1] + 2]
            if following:
                rows_SV = logits_SV[first : first + len(following)]
                scores += score_tokens(rows_SV, following, request.logprobs or 0, self.missing)
            if item.positions[-1] == len(text.tokens) - 1:
                logits[text] = logits_SV[-1:]
            else:
                del logits[text]

    def find_leaving(self, texts: Sequence[Text], logits: dict[Text, Tensor]) -> set[Text]:
        """Return the texts whose new token, which is judged now, exits by its logits."""
        leaving = set[Text]()
        judged = dict[tuple[Kind, float, bool], list[Text]]()
        for text in texts:
            rule, item = text.request.exit, text.judged
            if rule is None or item is None or text not in logits:
                continue
            if rule.kind == "oracle":
                text.trail.append((replace(item, reads=dict(item.reads)), logits[text][-1]))
            else:
                kind = cast(Kind, rule.kind)
                judged.setdefault((kind, rule.threshold, text.before_V is not None), []).append(
                    text
                )
        for (kind, threshold, has_before), group in judged.items():
            logits_BV = torch.stack([logits[text][-1] for text in group])
            wide = torch.promote_types(logits_BV.dtype, torch.float32)
            log_p_BV = logits_BV.log_softmax(-1, dtype=wide)
            before_BV = None
            if has_before:
                before_BV = torch.stack([cast(Tensor, text.before_V) for text in group])
            exits = decide_exits(kind, threshold, log_p_BV, before_BV)
            for text, log_p_V, leaves in zip(group, log_p_BV, exits, strict=True):
                text.before_V = log_p_V
                if leaves:
                    leaving.add(text)
        return leaving

    def consult_oracle(self, text: Text, logits: dict[Text, Tensor]) -> bool:
        """Let a new token that has run all loops exit after the first loop whose likeliest token is
        that of all loops, if there is an earlier one.

        Returns True if visits after the loops have to run again, for its keys and values there.
        """
        likeliest = int(logits[text][-1].argmax())
        for item, logits_V in text.trail:
            if int(logits_V.argmax()) == likeliest:
                text.exited_after = count_loops(item)
                text.fill_later(item)
                if text.route.coda == len(item.visits):
                    logits[text] = logits_V[None]
                    break
                del logits[text]
                text.item = at_visit(item, text.route.coda)
                return True
        return False

    def split_exited(self, text: Text, loops: int) -> None:
        """Part the known tokens of a text's item that left here before from the others, until those
        have left too or run all loops. So a preempted text is recomputed at the depths it had."""
        item = find_item(text)
        leaves = [bool(loops) and text.exits.get(p) == loops for p in item.positions]
        if any(leaves):
            rows = [i for i, each in enumerate(leaves) if each]
            text.exited_items.append(item.select(rows))
            text.fill_later(text.exited_items[-1])
        others = [i for i, each in enumerate(leaves) if not each]
        if others and item.index < text.route.coda:
            if any(leaves):
                text.item = item.select(others)
        elif text.exited_items:
            rest = [item] if others else []
            text.item = at_visit(join_items([*text.exited_items, *rest]), text.route.coda)
            text.exited_items.clear()

    def fill(self, texts: Sequence[Text]) -> None:
        """Fill the keys and values of the visits that tokens of these texts skipped, if the items
        of the texts are about to read them, or if as many tokens as a chunk wait for it."""
        assert self.passes is not None
        found = dict[tuple[str, Group], dict[Item, list[int]]]()
        for text in texts:
            reads = text.first_unfilled <= find_item(text).index < text.route.coda
            if not reads and len(text.unfilled) < self.chunk:
                continue
            assert text.request.exit is not None
            for item in text.unfilled:
                for number in range(item.index, text.route.coda):
                    key = text.request.exit.fill, item.visits[number].group
                    found.setdefault(key, {}).setdefault(item, []).append(number)
            text.unfilled.clear()
            text.first_unfilled = math.inf
        for (kind, _), skipped in found.items():
            for rows in cut_skipped(skipped, self.scheduler.max_rows):
                if kind == "state":
                    self.passes.fill_from_state(rows)
                else:
                    self.passes.fill_from_loop(rows)

    def choose_tokens(
        self, logits: dict[Text, Tensor], complete: Collection[Text]
    ) -> dict[Text, list[int]]:
        """Return the tokens that follow the rows of logits [S, V], by text; only those of complete
        items and of drafts."""
        groups = dict[tuple[object, ...], list[tuple[Text, Tensor, list[int]]]]()
        for text, logits_SV in logits.items():
            if text.mode != "draft" and text not in complete:
                continue
            request, after = text.request, find_item(text).positions[-1] + 1
            places = list(range(after - len(logits_SV) + 1, after + 1))
            seed = request.seed if request.temperature else 0
            missing = self.missing - request.eos_ids
            key = request.temperature, request.top_k, request.top_p, missing, seed
            groups.setdefault(key, []).append((text, logits_SV, places))
        chosen = dict[Text, list[int]]()
        for group in groups.values():
            request, logits_RV = group[0][0].request, torch.cat([part for _, part, _ in group])
            if self.missing - request.eos_ids:
                unused = torch.tensor(
                    sorted(self.missing - request.eos_ids), device=logits_RV.device
                )
                logits_RV = logits_RV.index_fill(-1, unused, -torch.inf)
            samples = [text.request.sample for text, _, places in group for _ in places]
            flat = [place for _, _, places in group for place in places]
            chosen_R = choose(
                logits_RV,
                torch.tensor(samples, device=logits_RV.device),
                torch.tensor(flat, device=logits_RV.device),
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                seed=request.seed,
            )
            ids = iter(chosen_R.tolist())
            chosen |= {text: [next(ids) for _ in places] for text, _, places in group}
        return chosen

    def propose(self, text: Text, token: int) -> None:
        """Take a drafted token: draft the next one, or verify all of them from where they are."""
        request = text.request
        assert request.draft is not None
        text.proposals.append(token)
        left = request.max_new_tokens - text.num_new
        text.item = None
        if token in request.eos_ids or len(text.proposals) >= min(request.draft.tokens, left):
            text.item, text.mode = join_items(text.shallow), "verify"

    def complete(
        self, text: Text, loops: int, tokens: Sequence[int], scores: Sequence[Score | None]
    ) -> None:
        """End the item of a text, with the new tokens that follow its rows, and their scores."""
        item = find_item(text)
        begin, proposals = text.computed, list(text.proposals)
        text.computed = item.positions[-1] + 1
        if text.mode == "verify":
            agreed = 0
            while agreed < len(proposals) and tokens[agreed] == proposals[agreed]:
                agreed += 1
            self.counts.drafted += len(proposals)
            self.counts.accepted += agreed
            # The first token that differs is the one that full depth chooses after the others.
            tokens = tokens[: agreed + 1]
            text.computed = begin + len(tokens)
        text.forget_item()
        for token, score in zip(tokens, scores, strict=False):
            if token in text.request.eos_ids:
                self.end(text, "stop")
                return
            text.tokens.append(token)
            self.counts.tokens += 1
            self.counts.loops += loops
            is_last = text.num_new == text.request.max_new_tokens
            if is_last:
                self.scheduler.publish(text)
                self.scheduler.end(text)
            reason: Reason | None = "length" if is_last else None
            text.handle.events.put(Event(token, loops, reason, score))
            if is_last:
                return
        self.scheduler.publish(text)


def find_item(text: Text) -> Item:
    """Return the item of a text that has one."""
    assert text.item is not None
    return text.item


def count_loops(item: Item) -> int:
    """Return the number of loops after the last visit of an item, if tokens may exit there; else
    0."""
    return item.visits[item.index - 1].exit


def may_leave_loops(text: Text) -> bool:
    """Return True if tokens of a text may leave the loops after the pass that has just run."""
    item, request = find_item(text), text.request
    loops = count_loops(item)
    if text.mode == "draft":
        assert request.draft is not None
        return loops == request.draft.loops
    if request.exit is None or not text.num_new or text.mode == "verify":
        return False
    if item.positions[-1] < len(text.tokens) - 1:
        return bool(loops) or item.index == text.route.coda
    return loops == request.exit.threshold if request.exit.kind == "loop" else bool(loops)


def at_visit(item: Item, index: int) -> Item:
    """Return a copy of an item at another visit."""
    return replace(item, index=index, reads=dict(item.reads))


def cut_skipped(
    skipped: Mapping[Item, Sequence[int]], most: int
) -> Iterator[dict[Item, list[int]]]:
    """Yield parts of items with their skipped visits, of at most `most` rows over all visits, or of
    one visit."""
    part, rows = dict[Item, list[int]](), 0
    for item, visits in skipped.items():
        for index in visits:
            rows += len(item.positions)
            if part and rows > most:
                yield part
                part, rows = {}, len(item.positions)
            part.setdefault(item, []).append(index)
    if part:
        yield part


def count_read(text: Text) -> int:
    """Return the number of last rows of a text's item whose logits are needed now."""
    item = find_item(text)
    if item.index < len(item.visits):
        return 0
    scored = text.request.score_prompt and not text.num_new
    if scored or text.mode == "verify":
        return len(item.positions)
    return int(text.mode == "draft" or item.positions[-1] == len(text.tokens) - 1)


def join_items(items: Sequence[Item]) -> Item:
    """Return items of one text, which have left the same loops or run all, as one item in the order
    of positions."""
    names = items[0].reads
    joined = replace(
        items[0],
        tokens=[token for item in items for token in item.tokens],
        positions=[position for item in items for position in item.positions],
        x_SD=torch.cat([cast(Tensor, item.x_SD) for item in items]),
        reads={name: torch.cat([item.reads[name] for item in items]) for name in names},
    )
    order = sorted(range(len(joined.positions)), key=joined.positions.__getitem__)
    return joined if order == list(range(len(order))) else joined.select(order)
