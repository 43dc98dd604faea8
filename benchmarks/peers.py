"""The same local training as peers do it: their own libraries' loops, their own models, nothing of the cohort engine.

Every peer gets its rows as ready tensors and keeps what it keeps in real life; attention is what each library takes by
default. All of them train the same rows in the same order with the same AdamW and clipping, so results can be compared.
"""

import importlib
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from fedstrata.benchmarks.cohorts import SCALING, Tensors, Work
from fedstrata.core import kernels
from fedstrata.core.adapters import Flat
from fedstrata.core.config import ModelSection


class PeftLoop:
    """A plain PEFT loop: one model is kept, every client's adapter is copied into it, a new AdamW per client."""

    def __init__(self, work: Work, foreach: bool | None = None) -> None:
        """foreach: torch's own choice, or its way with few calls."""
        self.work, self.foreach = work, foreach
        self.model = new_model(work)
        self.trained = adapter(self.model, work)

    def round(self) -> list[Flat]:
        """Trains every client; their adapters in fedstrata's flat form."""
        return [self.client(client) for client in range(len(self.work.jobs))]

    def client(self, client: int) -> Flat:
        """Trains one client."""
        put(self.trained, self.work.jobs[client].flat, self.work)
        settings = self.work.settings
        optimiser = torch.optim.AdamW(
            self.trained, lr=settings.lr, weight_decay=settings.weight_decay, foreach=self.foreach
        )
        for rows in self.work.steps[client]:
            optimiser.zero_grad()
            self.model(**rows).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, settings.max_grad_norm)
            optimiser.step()
        return take(self.trained)


class Trainer:
    """A new Hugging Face Trainer for every client-round.

    keep: the model stays and the adapter is copied into it (FCIT, OpenFedLLM); else model and adapter are built for
    every client-round too (FlowerTune's template).
    """

    def __init__(self, work: Work, keep: bool = True) -> None:
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        self.work = work
        self.model = new_model(work) if keep else None

    def round(self) -> list[Flat]:
        """Trains every client."""
        return [self.client(client) for client in range(len(self.work.jobs))]

    def client(self, client: int) -> Flat:
        """Trains one client."""
        from transformers import PrinterCallback
        from transformers import Trainer as HuggingFaceTrainer

        model = self.model or new_model(self.work)
        trained = adapter(model, self.work)
        put(trained, self.work.jobs[client].flat, self.work)
        rows = [row for step in self.work.steps[client] for row in _apart(step)]
        with tempfile.TemporaryDirectory() as folder:
            trainer = HuggingFaceTrainer(
                model=model, args=self._settings(folder), train_dataset=rows, data_collator=_together
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return take(trained)

    def _settings(self, folder: str) -> Any:
        from transformers import TrainingArguments

        settings = self.work.settings
        return TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=settings.batch_size,
            num_train_epochs=settings.local_epochs,
            learning_rate=settings.lr,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",  # the rows lie in the order of the plan
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
        )


class Pfl:
    """pfl-research: one resident model, clients one after another through its own backend and federated averaging.

    Raises:
        ModuleNotFoundError: it is not installed.
    """

    def __init__(self, work: Work) -> None:
        names = ("model.pytorch", "data.federated_dataset", "data.pytorch", "aggregate.simulate")
        model, federated, tensors, simulate = (importlib.import_module(f"pfl.{name}") for name in names)
        averaging, base = (importlib.import_module(f"pfl.algorithm.{n}") for n in ("federated_averaging", "base"))
        hyper = importlib.import_module("pfl.hyperparam")
        self.work, settings = work, work.settings
        module = new_model(work)
        self.trained = adapter(module, work)
        module.loss = lambda **rows: module(**rows).loss
        module.metrics = lambda **rows: {}
        self.model = model.PyTorchModel(
            module,
            partial(torch.optim.AdamW, weight_decay=settings.weight_decay),
            torch.optim.SGD(self.trained, lr=1.0),
        )
        users = {str(client): tensors.PyTorchTensorDataset(_whole(steps)) for client, steps in enumerate(work.steps)}
        turn = iter(_endless(list(users)))
        dataset = federated.FederatedDataset(users.__getitem__, lambda: next(turn))
        self.backend = simulate.SimulatedBackend(training_data=dataset, val_data=dataset)
        self.algorithm = averaging.FederatedAveraging()
        train = hyper.NNTrainHyperParams(
            local_batch_size=settings.batch_size,
            local_num_epochs=settings.local_epochs,
            local_learning_rate=settings.lr,
            local_max_grad_norm=settings.max_grad_norm,
        )
        told = base.NNAlgorithmParams(
            central_num_iterations=10**9,
            evaluation_frequency=10**9,
            train_cohort_size=len(users),
            val_cohort_size=0,
        )
        self.context = self.algorithm.get_next_central_contexts(self.model, 1, told, train)[0][0]

    def round(self) -> Flat:
        """Trains every client; the mean of their adapters, which is all that it keeps."""
        put(self.trained, self.work.jobs[0].flat, self.work)
        statistics, _ = self.backend.gather_results(self.model, self.algorithm, central_context=self.context)
        statistics.average()
        names = list(self.model.variable_map)
        parts = {id(self.model.variable_map[name]): statistics[name] for name in names}
        update = np.concatenate([parts[id(parameter)].numpy().ravel() for parameter in self.trained])
        return self.work.jobs[0].flat + update.astype(np.float32)


def through_onednn(round_: Callable[[], list[Flat]]) -> Callable[[], list[Flat]]:
    """The same round with torch's float32 products switched to oneDNN, which none of the peers does by itself."""

    def switched() -> list[Flat]:
        kernels.use(ModelSection(device="cpu", matmul="onednn"))
        try:
            return round_()
        finally:
            kernels.use(ModelSection(matmul="default"))

    return switched


def new_model(work: Work) -> Any:
    """The base with a PEFT adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work.section.name)
    targets = [name for name, _, _ in work.base.layout.modules]
    return get_peft_model(model, LoraConfig(r=work.rank, lora_alpha=int(SCALING * work.rank), target_modules=targets))


def adapter(model: Any, work: Work) -> list[torch.nn.Parameter]:
    """The trained parameters in the order of fedstrata's flat form."""
    found, kinds = dict(model.named_parameters()), ("lora_A", "lora_B")
    names = [name for name, _, _ in work.base.layout.modules]
    return [found[f"base_model.model.{name}.{kind}.default.weight"] for name in names for kind in kinds]


@torch.no_grad()
def put(trained: list[torch.nn.Parameter], flat: Flat, work: Work) -> None:
    """Copies a flat adapter into the model."""
    values = (factor for pair in work.base.layout.split(flat).values() for factor in pair)
    for parameter, value in zip(trained, values, strict=True):
        parameter.copy_(torch.from_numpy(value))


def take(trained: list[torch.nn.Parameter]) -> Flat:
    """The flat adapter of the model."""
    return np.concatenate([parameter.detach().numpy().ravel() for parameter in trained])


def _apart(step: Tensors) -> list[Tensors]:
    return [{name: value[row] for name, value in step.items()} for row in range(len(step["input_ids"]))]


def _together(rows: list[Tensors]) -> Tensors:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _whole(steps: tuple[Tensors, ...]) -> Tensors:
    return {name: torch.cat([step[name] for step in steps]) for name in steps[0]}


def _endless(names: list[str]) -> Any:
    while True:
        yield from names
