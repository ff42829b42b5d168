"""What figures of scores with a reference share: their cases, and what each is called; draws none itself."""


def found(spec, runs) -> list:
    """(case, runs) of each case with a reference and records; heads have figures of their own."""
    cases = [(name, case) for name, case in spec.cases.items() if case.reference is not None and case.prune == "all"]
    return [(case, runs[name]) for name, case in cases if runs.get(name)]


def probes(case) -> int:
    """How many random probes the score takes; 0 where it takes none."""
    options = case.score.options if case.score else {}
    return options.get("probes", 0) if options.get("curvature") == "hutchinson" else 0


def network(case) -> str:
    """The network of a task, by its name."""
    return case.task.use.rpartition(".")[2].partition(":")[0].rpartition("_")[2].replace("resnet", "ResNet-")
