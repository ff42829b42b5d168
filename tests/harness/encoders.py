"""Sentences of twenty words in the layout of GLUE, and an encoder of two narrow layers that reads them."""

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["good", "fine", "bad", "poor", *(f"w{i}" for i in range(16))]
TRAIN, DEV = 90, 24
HEADS = 4


def sentence(number):
    """A sentence that no other is like, and its label, which the second word decides."""
    label = number % 2
    filler = [f"w{(number * 7 + i) % 16}" for i in range(number % 9)]
    # the number in base 16, so that no two are alike
    return " ".join([f"w{number % 16}", WORDS[number % 4 // 2 + 2 * label], f"w{number // 16}", *filler]), label


def rows(numbers, name):
    """The TSV of a task, with these sentences."""
    found = [sentence(number) for number in numbers]
    if name == "MRPC":
        lines = [f"{label}\t{i}\t{i}\t{text}\tw1 {text}" for i, (text, label) in enumerate(found)]
        return "\n".join(["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *lines, ""])
    if name == "CoLA":
        return "\n".join([*(f"x\t{label}\t\t{text}" for text, label in found), ""])
    return "\n".join(["sentence\tlabel", *(f"{text}\t{label}" for text, label in found), ""])


def saved(folder, model, tokenizer):
    """The folder, with a model and its tokenizer in it."""
    from hap.harness.tasks import encoder

    with encoder.quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
