"""Attention heads of BERT-base: seconds to find them and to score them, and what is gained when they go.

Random weights and random sentences, so that nothing is loaded: pairs as in MRPC, 30 to 80 tokens long (53 there on
average), padded to the longest of their batch. `tracing`: trace, couple and heads at 16 tokens. `scores`: in probes,
the time of one more probe of `hutchinson` on eager attention for the weights of the heads (the graph of the gradients
is built before, and not timed); medians of the ratios in each round, in which all take turns. Of ablation two heads
are timed, for its cost grows as their number. `latency`: of a forward pass at 64 tokens with 60 % of the heads gone by
random scores, beside dense and masked; with implants, a quarter of those heads has one of rank 8.

The bars: tracing under 10 s on eager attention and SDPA; the Gauss-Newton diagonal of all 144 heads on 64 sentences at
most 2 probes, on either. Two threads, or `--threads`; of one alone the CPU's seconds are taken, which are the clock's
on an idle machine. `python benchmarks/bench_heads.py [PARTS] --repeats N --json FILE` does without pytest; `--smoke`,
and BENCH_SMOKE=1 with pytest, take a tiny BERT for one round and hold no bar.
"""

import ctypes
import gc
import os
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from operator import truediv
from pathlib import Path
from statistics import median

import command
import pytest
import torch
from bench_tracing import GIB, resident, two_threads  # noqa: F401  # the fixture is for all tests here
from transformers import BertConfig, BertForSequenceClassification

from hap import Budget, CrossEntropy, apply, couple, trace
from hap.hessian.hutchinson import hutchinson
from hap.implants import zero
from hap.methods import ablation, hessian_trace, magnitude, michel, random
from hap.plan import plan
from hap.structure.heads import heads
from hap.surgery.apply import mask

ATTENTION = ("sdpa", "eager")
TRACING, PROBES = 10.0, 2.0  # the bars: seconds; probes
SENTENCES, BATCH, LENGTHS = 64, 16, (30, 80)
ABLATED, REPEATS = 2, 3  # heads; rounds
PROBE = "hutchinson, a probe"
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BUDGETS = {
    "heads gone": Budget(groups=0.6, layer_limit=1.0),
    "with implants": Budget(groups=0.6, layer_limit=1.0, implant=0.25, rank=8),
}


def bert(attention, smoke):
    torch.manual_seed(0)
    config = BertConfig(**(TINY if smoke else {}), attn_implementation=attention)
    return BertForSequenceClassification(config).eval()


def logits(model, inputs):
    return model(**inputs).logits


LOSS = CrossEntropy(call=logits)


def sentences(lengths, rng):
    """Pairs of random tokens with these lengths, as a tokenizer hands them out."""
    at = torch.arange(int(lengths.max()))
    there = (at < lengths[:, None]).long()
    ids = torch.randint(1000, 30000, there.shape, generator=rng) * there
    second = (at >= lengths[:, None] // 2).long() * there
    return {"input_ids": ids, "attention_mask": there, "token_type_ids": second}


def calibration(smoke):
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(LENGTHS[0], LENGTHS[1] + 1, (4 if smoke else SENTENCES,), generator=rng)
    return [(sentences(part, rng), torch.randint(2, (len(part),), generator=rng)) for part in lengths.split(BATCH)]


def found_heads(model):
    rng = torch.Generator().manual_seed(0)
    return heads(couple(model, trace(model, sentences(torch.tensor([16]), rng)), "union"))


def now():
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(work):
    start = now()
    found = work()
    return now() - start, found


def seconds(work):
    return timed(work)[0]


def tracing(smoke, repeats):
    rows, bars = {}, []
    for attention in ATTENTION:
        model = bert(attention, smoke)
        took, found = zip(*(timed(partial(found_heads, model)) for _ in range(repeats)), strict=True)
        rows[attention] = {"seconds": median(took), "heads": len(found[0])}
        bars.append((f"{attention}, seconds", median(took), TRACING))
    return {"rows": rows, "bars": bars}


class Ticks:
    """The time at each probe: `hutchinson` hands every one to `reduce`."""

    def __init__(self, groups):
        self.groups, self.at = groups, []

    def reduce(self, values):
        found = self.groups.reduce(values)
        self.at.append(now())
        return found


def probe(model, batches, groups):
    """One more probe on all batches, its share of the graph left out."""
    ticks, rng = Ticks(groups), torch.Generator().manual_seed(0)
    hutchinson(model, LOSS, batches, ticks, probes=2, rng=rng, names=groups.weights(), together=1)
    return sum(second - first for first, second in zip(ticks.at[::2], ticks.at[1::2], strict=True))


def scored(method, model, batches, groups, **options):
    return seconds(partial(method, model, LOSS, batches, groups, rng=torch.Generator().manual_seed(0), **options))


def few_ablated(model, batches, groups):
    """A head; what is measured beside them is the loss of the dense model, a pass as any other."""
    rows, slots = (torch.where(of < ABLATED, of, -1) for of in (groups.row_group, groups.slot_group))
    few = replace(groups, row_group=rows, slot_group=slots, _count=ABLATED)
    return scored(ablation, model, batches, few) / (ABLATED + 1)


CONTESTANTS = {  # and on which attention
    PROBE: (probe, "eager"),
    "hutchinson, one probe and its graph": (partial(scored, hessian_trace, curvature="hutchinson", probes=1), "eager"),
    "hessian_trace, sdpa": (partial(scored, hessian_trace), "sdpa"),
    "hessian_trace, eager": (partial(scored, hessian_trace), "eager"),
    "michel": (partial(scored, michel), "sdpa"),
    "ablation, a head": (few_ablated, "sdpa"),
    "magnitude": (partial(scored, magnitude), "sdpa"),
}


def peaked(work):
    """What `work` says, and the most bytes that the process held meanwhile (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return work(), resident("VmHWM")


def scores(smoke, repeats):
    models, batches = {attention: bert(attention, smoke) for attention in ATTENTION}, calibration(smoke)
    groups = found_heads(models["sdpa"])  # the same of either
    took, peaks = defaultdict(list), defaultdict(int)
    for _ in range(repeats):
        for who, (run, attention) in CONTESTANTS.items():
            each, peak = peaked(partial(run, models[attention], batches, groups))
            took[who].append(each)
            peaks[who] = max(peaks[who], peak)
    took["ablation, every head"] = [(len(groups) + 1) * each for each in took["ablation, a head"]]
    rows = {who: {"seconds": median(t), "probes": median(map(truediv, t, took[PROBE]))} for who, t in took.items()}
    for who, peak in peaks.items():
        rows[who]["GiB"] = peak / GIB
    bars = [(f"{who}, probes", rows[who]["probes"], PROBES) for who in rows if who.startswith("hessian_trace")]
    return {"rows": rows, "bars": bars, "rounds": took}


def prunings(smoke):
    """The models by name, and what each plan leaves of the MACs of the layers."""
    model, rng = bert("sdpa", smoke), torch.Generator().manual_seed(0)
    groups = found_heads(model)
    by_chance, models, left = random(model, LOSS, [], groups, rng=rng), {"dense": model}, {"dense": 1.0}
    for name, budget in BUDGETS.items():
        chosen = plan(groups, by_chance, budget)
        models.setdefault("masked", mask(model, groups, chosen))
        models[name] = apply(model, groups, chosen, zero, call=logits)
        left[name] = 1 - chosen.removed["macs"]
    return models, left


@torch.inference_mode()
def latency(smoke, repeats):
    models, left = prunings(smoke)
    rows = {name: {"MACs": 1 / left.get(name, 1.0)} for name in models}
    for batch in (1, 2) if smoke else (1, 32):
        inputs, took = sentences(torch.full((batch,), 64), torch.Generator().manual_seed(1)), defaultdict(list)
        for turn in range(repeats * max(1, 8 // batch) + 1):  # the first for what is set up at a first call
            for name, model in models.items():
                each = seconds(partial(model, **inputs))
                took[name] += [each] * bool(turn)
        for name, each in took.items():
            rows[name][f"batch {batch}: ms"] = 1e3 * median(each)
            for other in ("dense", "masked"):
                rows[name][f"{batch}: than {other}"] = median(map(truediv, took[other], each))
    return {"rows": rows, "bars": [], "removed": {name: 1 - share for name, share in left.items()}}


PARTS = {"tracing": tracing, "scores": scores, "latency": latency}


def measure(name, smoke, repeats=REPEATS):
    """All that is measured of a part; one entry of the JSON."""
    found = PARTS[name](smoke, 1 if smoke else repeats)
    return {"part": name, "smoke": smoke, "repeats": repeats} | found | ({"bars": []} if smoke else {})


def broken(found):
    """The bars that do not hold."""
    return [f"{what}: {value:.2f} > {bar}" for what, value, bar in found["bars"] if value > bar]


def table(found):
    columns = list(dict.fromkeys(column for row in found["rows"].values() for column in row))
    lines = [f"\n{found['part']:38}" + "".join(f"{column:>{len(column) + 4}}" for column in columns)]
    for name, row in found["rows"].items():
        says = (f"{row[c]:.2f}" if c in row else "" for c in columns)
        lines.append(f"  {name:36}" + "".join(f"{each:>{len(c) + 4}}" for c, each in zip(columns, says, strict=True)))
    for what, value, bar in found["bars"]:
        lines.append(f"  bar: {what}: {value:.2f} of at most {bar:g}: {'not ' * (value > bar)}met")
    return "\n".join(line.rstrip() for line in lines)


@pytest.mark.parametrize("name", PARTS)
def test_heads_of_bert(benchmark, name, capsys):
    found = benchmark.pedantic(measure, (name, "BENCH_SMOKE" in os.environ), rounds=1, iterations=1)
    benchmark.extra_info |= found
    with capsys.disabled():  # the comparison is the point
        print(table(found))
    assert not broken(found)


def main():
    parser = command.options(__doc__, PARTS)
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"rounds; default {REPEATS}")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    command.run(args, PARTS, partial(measure, repeats=args.repeats), table, broken)


if __name__ == "__main__":
    main()
