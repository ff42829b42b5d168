"""Hessian-aware pruning and neural implants [Yu22]: functions on models, which neither read or write files nor print.

The examples in docstrings are run by the tests, after `import torch`, `from torch import nn`, `from hap import *` and
the names of the function's own module.

References, cited as [key] in the docstrings:

[Yu22]         Yu, Yao, Gholami, Dong, Kim, Mahoney, Keutzer.
               Hessian-Aware Pruning and Optimal Neural Implant. WACV 2022.
[HAP-code]     github.com/yaozhewei/HAP at 1551d77, the published code.
[LeCun90]      LeCun, Denker, Solla. Optimal Brain Damage. NeurIPS 1990.
[Hutchinson90] Hutchinson. A stochastic estimator of the trace of the influence matrix. Comm. Stat. 19, 1990.
[Schraudolph02] Schraudolph. Fast curvature matrix-vector products. Neural Computation 14, 2002.
[Goodfellow15] Goodfellow. Efficient per-example gradient computations. arXiv 1510.01799, 2015.
[Li17]         Li, Kadav, Durdanovic, Samet, Graf. Pruning Filters for Efficient ConvNets. ICLR 2017.
[Hinton15]     Hinton, Vinyals, Dean. Distilling the Knowledge in a Neural Network. arXiv 1503.02531, 2015.
[Izenman75]    Izenman. Reduced-rank regression for the multivariate linear model. J. Multivariate Analysis 5, 1975.
[Michel19]     Michel, Levy, Neubig. Are Sixteen Heads Really Better than One? NeurIPS 2019.
[Molchanov19]  Molchanov, Mallya, Tyree, Frosio, Kautz. Importance Estimation for Neural Network Pruning. CVPR 2019.
[Hassibi93]    Hassibi, Stork. Second order derivatives for network pruning: Optimal Brain Surgeon. NeurIPS 1993.
[Xie21]        Xie, Fu, Tian, Zhou, Chen. Pruning with Compensation: Efficient Channel Pruning for Deep Convolutional
               Neural Networks. arXiv 2108.13728, 2021; code: github.com/ZhouyangXie/pseudopruner.
[Kurtic23]     Kurtic, Frantar, Alistarh. ZipLM: Inference-Aware Structured Pruning of Language Models. NeurIPS 2023.
[An24]         An, Zhao, Yu, Tang, Wang. Fluctuation-based Adaptive Structured Pruning for LLMs. AAAI 2024.
[Yule12]       Yule. On the methods of measuring association between two attributes. J. R. Stat. Soc. 75, 1912.
[Holm79]       Holm. A simple sequentially rejective multiple test procedure. Scandinavian J. Statistics 6, 1979.
[Efron87]      Efron. Better bootstrap confidence intervals. J. Am. Stat. Assoc. 82, 1987.
[Schuirmann87] Schuirmann. A comparison of the two one-sided tests procedure. J. Pharmacokin. Biopharm. 15, 1987.
[Satterthwaite46] Satterthwaite. An approximate distribution of estimates of variance components. Biometrics 2, 1946.
[Lehmann05]    Lehmann, Romano. Testing Statistical Hypotheses. Springer, 2005.
[Searle92]     Searle, Casella, McCulloch. Variance Components. Wiley, 1992.
[Efron93]      Efron, Tibshirani. An Introduction to the Bootstrap. Chapman & Hall, 1993.
[Zou08]        Zou, Donner. Construction of confidence limits about effect measures. Statistics in Medicine 27, 2008.
[Mania19]      Mania, Miller, Schmidt, Hardt, Recht. Model similarity mitigates test set overuse. NeurIPS 2019.

A name is imported on first use, so that `import hap` takes no time and `hap --help` does not wait for torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


class HapError(ValueError):
    """A mistake of the user, in one line: the thing, the rule, and what was found instead."""


_HOMES = {
    "structure.tracing": "trace declare Feeds",
    "structure.groups": "couple Groups",
    "hessian.losses": "CrossEntropy SquaredError",
    "hessian.accumulate": "Curvature",
    "hessian.hutchinson": "hutchinson",
    "hessian.exact": "exact",
    "budget": "Budget",
    "plan": "Fate Plan",
    "surgery.apply": "apply mask",
    "implants": "merge",
    "pruning": "prune",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = [*_HOME, "HapError"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hap' has no attribute {name!r}")
    return getattr(import_module(f"hap.{_HOME[name]}"), name)
