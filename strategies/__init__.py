"""The catalogue of methods. Outsiders write `strategy.name=my_pkg.my_mod:MyStrategy` and need no entry here."""

import importlib
from collections.abc import Mapping

from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedstrata.core.errors import BadInput, unknown
from fedstrata.strategies.base import Strategy
from fedstrata.strategies.controls import Oracle, RandomRoute
from fedstrata.strategies.copa import Copa
from fedstrata.strategies.disco import Disco
from fedstrata.strategies.ewc import Ewc
from fedstrata.strategies.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from fedstrata.strategies.fedprox import FedProx
from fedstrata.strategies.finetune import Finetune, Joint
from fedstrata.strategies.flower import wrap
from fedstrata.strategies.hide import Hide
from fedstrata.strategies.l2p import L2P
from fedstrata.strategies.lwf import Lwf
from fedstrata.strategies.mlora import MLora
from fedstrata.strategies.modalprompt import ModalPrompt
from fedstrata.strategies.moelora import MoELora
from fedstrata.strategies.olora import OLora
from fedstrata.strategies.replay import Replay
from fedstrata.strategies.robust import FedMedian, FedTrimmed, Geomedian, MultiKrum
from fedstrata.strategies.scaffold import Scaffold
from fedstrata.strategies.strata import Strata

STRATEGIES: Mapping[str, type[Strategy]] = {
    "finetune": Finetune,
    "joint": Joint,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedmedian": FedMedian,
    "fedtrimmed": FedTrimmed,
    "multikrum": MultiKrum,
    "geomedian": Geomedian,
    "scaffold": Scaffold,
    "ewc": Ewc,
    "lwf": Lwf,
    "l2p": L2P,
    "modalprompt": ModalPrompt,
    "moelora": MoELora,
    "olora": OLora,
    "replay": Replay,
    "mlora": MLora,
    "copa": Copa,
    "hide": Hide,
    "disco": Disco,
    "strata": Strata,
    "oracle": Oracle,
    "random-route": RandomRoute,
}


def find(name: str) -> type[Strategy]:
    """The class behind `strategy.name`: a name of the catalogue or `package.module:Class`.

    Raises:
        BadInput: unknown name, a module that cannot be imported, or an object that is no Flower strategy.
    """
    if ":" not in name:
        if name not in STRATEGIES:
            raise unknown("strategy.name", name, STRATEGIES)
        return STRATEGIES[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise BadInput(f"strategy.name: cannot load {name!r}: {error}") from error
    if isinstance(found, type) and issubclass(found, Strategy):
        return found
    if isinstance(found, type) and issubclass(found, FlowerStrategy):
        return wrap(found)
    raise BadInput(f"strategy.name: {name!r} is no subclass of fedstrata's or Flower's Strategy")
