"""An encoder of transformers, fine-tuned on a task of GLUE where its weights are not in the cache; knows no pruning."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hap import HapError
from hap.harness.task import Data, MissingData, Seen, Task
from hap.harness.tasks import glue, text
from hap.harness.tasks.cache import Trained, cached
from hap.harness.tasks.data import device, positive
from hap.harness.tasks.pickles import first_line
from hap.harness.train import loop as training
from hap.harness.train import recipe as recipes
from hap.harness.train import step as stepping
from hap.hessian import losses
from hap.hessian.losses import CrossEntropy

SMOKE = {"train": 64, "validation": 32, "test": 32, "calibration": 8}
HELD_OUT = 0.1  # of train, for validation; at most MOST
MOST = 1000


class Source(NamedTuple):
    """Where a pretrained encoder comes from: a folder, or a name on the hub and its revision."""

    place: str
    revision: str | None = None


def finetuned(
    name: str,
    source: Callable[[], Source],
    seed: int,
    *,
    data: Literal["MRPC", "SST-2", "CoLA"],
    samples: int = 128,
    batch: int = 32,
    train_samples: int | None = None,
    subset: int | None = None,
    epochs: int = 3,
    lr: float = 2e-5,
    length: int = 128,
    autocast: str | None = None,
    attention: Literal["sdpa", "eager"] = "sdpa",
    smoke: bool = False,
    fit: training.Fit | None = None,
) -> Task:
    """The encoder with a fresh head, trained with this seed: AdamW, batches of 32, a tenth of warm-up, linear decay.

    `data`: MRPC, SST-2 or CoLA. `samples`: for calibration, drawn by the seed. `train_samples`: of an epoch of
    fine-tuning after pruning, drawn anew each epoch. `subset`: all training is on so many samples, the same for all
    seeds. `length`: in tokens, at most. `attention`: "sdpa" or "eager".
    """
    given = {"samples": samples, "batch": batch, "train_samples": train_samples, "subset": subset, "epochs": epochs}
    positive(length=length, **{name: value for name, value in given.items() if value is not None})
    metric, place = glue.layout(data).metric, source()
    model, tokenizer = loaded(place, seed, attention)
    parts, found = _splits(data, tokenizer, length, SMOKE if smoke else {"train": subset})
    found = replace(found, note=f"{found.note}; encoder {name} sha256 {_digest(model.base_model)[:16]}, {version()}")
    recipe = _recipe(1 if smoke else epochs, lr, autocast)
    made = workload(
        f"{name}_{data}",
        model.to(device()),
        parts,
        found,
        seed,
        pad=tokenizer.pad_token_id,
        samples=min(samples, SMOKE["calibration"]) if smoke else samples,
        batch=batch,
        train_samples=train_samples,
        metric=metric,
    )
    digests = [found.sha256, _digest(model, parts["train"]), version()]
    decides = [place.revision, recipe, subset, length, attention, SMOKE if smoke else None, *digests]
    whole = partial(text.epoch, parts["train"], pad=tokenizer.pad_token_id)
    learner = replace(made, train=whole, train_size=len(parts["train"].labels))
    trained = cached(made.name, seed, decides, SOURCES, partial(_trained, learner, recipe, seed, fit))
    made.model.load_state_dict(trained.weights)
    made.model.eval()
    return replace(made, notes=tuple(trained.notes))


def workload(
    name: str,
    model: nn.Module,
    parts: dict[str, text.Tokens],
    data: Data,
    seed: int,
    *,
    pad: int,
    samples: int,
    batch: int,
    train_samples: int | None,
    metric: str,
    shown: int = 64,
) -> Task:
    """The task of an encoder and these splits; MACs and latency are those of an example of `shown` tokens at most."""
    loss, train = CrossEntropy(call=logits), parts["train"]

    def evaluate(model: nn.Module, which: str, seen: Seen | None = None) -> dict[str, float]:
        return text.measure(model, loss.call, parts[which], pad, seen=seen)

    longest = train.lengths.argmax()[None]
    return Task(
        name=name,
        model=model.eval(),
        loss=loss,
        batches=text.calibration(train, samples, batch, training.generator(seed, "calibration"), pad),
        train=partial(text.epoch, train, pad=pad, limit=train_samples),
        train_size=min(train_samples or len(train.labels), len(train.labels)),
        evaluate=evaluate,
        example={key: value[:, :shown] for key, value in train.batch(longest, pad)[0].items()},
        data=data,
        metric=metric,
        test_samples=len(parts["test"].labels) if "test" in parts else None,
    )


SOURCES: list[ModuleType] = [text, glue, training, stepping, recipes, losses, sys.modules[__name__]]


def logits(model: nn.Module, inputs: Any) -> Tensor:
    """What an encoder with a head says of a batch."""
    return model(**inputs).logits  # type: ignore[no-any-return]


def loaded(source: Source, seed: int, attention: str = "sdpa") -> tuple[Any, Any]:
    """The pretrained encoder with a head for two classes that the seed draws, and its tokenizer."""
    try:
        import transformers
    except ImportError:
        raise MissingData("transformers is not installed: python -m pip install 'hap[heads]'") from None
    with quiet(), torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(training.generator(seed, "init").initial_seed())
        pinned = {} if source.revision is None else {"revision": source.revision}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.place, **pinned)
            model, told = transformers.AutoModelForSequenceClassification.from_pretrained(
                source.place,
                num_labels=2,
                use_safetensors=True,
                attn_implementation=attention,
                dtype=torch.float32,
                output_loading_info=True,
                **pinned,
            )
        except Exception as error:  # not there, damaged, or a hub that is away: transformers lets through what it meets
            raise MissingData(f"{source.place}: a pretrained encoder expected (found {first_line(error)})") from None
    _whole(source, model, tokenizer, told["missing_keys"])
    return model, tokenizer


def _whole(source: Source, model: Any, tokenizer: Any, missing: Iterable[str]) -> None:
    """HapError where transformers made up more than a head: it draws weights that it does not find, and goes on."""
    body = f"{model.base_model_prefix}."
    drawn = sorted(name for name in missing if name.startswith(body) and not name.startswith(f"{body}pooler."))
    if drawn:
        raise HapError(f"{source.place}: the weights of a whole encoder expected, found no {drawn[0]}")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise HapError(f"{source.place}: the vocabulary of its tokenizer expected, found none")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' lines and bars: that a head is new is known."""
    from transformers.utils import logging as found

    logging: Any = found  # without types
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _recipe(epochs: int, lr: float, autocast: str | None) -> training.Recipe:
    """That of [Michel19], with a warm-up of a tenth and gradients clipped as BERT was fine-tuned."""
    plan: dict[str, Any] = {"lr": lr, "weight_decay": 0.01, "batch_size": 32, "schedule": "linear", "clip": 1.0}
    return training.Recipe(epochs, **plan, warmup_epochs=0.1 * epochs, optimiser="adamw", autocast=autocast)


def _splits(
    data: str, tokenizer: Any, length: int, most: Mapping[str, int | None]
) -> tuple[dict[str, text.Tokens], Data]:
    """Train, validation (a part of train, the same for all seeds) and test, on the device; of each at most `most`."""
    import numpy as np

    train, test, found = glue.glue(data)
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in tokenizer.model_input_names]
    vocabulary = tokenizer.backend_tokenizer.to_str().encode()
    encode = partial(_encode, tokenizer)
    whole, tested = (text.tokens(part, encode, vocabulary, length, names).to(device()) for part in (train, test))
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(whole.labels)))  # the same on every version
    held = min(MOST, int(HELD_OUT * len(order)))
    index = {"train": order[held:], "validation": order[:held], "test": torch.arange(len(tested.labels))}
    index = {part: each[: most.get(part)] for part, each in index.items()}
    return {part: (tested if part == "test" else whole).part(each) for part, each in index.items()}, found


def _encode(tokenizer: Any, texts: list[tuple[str, ...]], length: int) -> list[tuple[list[int], list[int]]]:
    columns = [list(column) for column in zip(*texts, strict=True)]
    found = tokenizer(*columns, truncation=True, max_length=length, return_token_type_ids=True)
    return list(zip(found["input_ids"], found["token_type_ids"], strict=True))


def _trained(task: Task, recipe: training.Recipe, seed: int, fit: training.Fit | None, keep: Path) -> Trained:
    rng = training.generator(seed, "train")
    curve = (fit or training.fit)(task.model, task, recipe, rng=rng, keep=keep, snapshots=False)
    return Trained(training.snapshot(task.model), curve.notes)


def version() -> str:
    """That of transformers, whose code a forward pass is."""
    return f"transformers {metadata.version('transformers')}"


def _digest(model: nn.Module, train: text.Tokens | None = None) -> str:
    """The sha256 of the weights before training and of its tokens, which say what was downloaded or installed."""
    total, tokens = sha256(), {} if train is None else {"ids": train.ids.cpu(), "types": train.types.cpu()}
    for name, value in {**training.snapshot(model), **tokens}.items():
        total.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
