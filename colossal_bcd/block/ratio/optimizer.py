"""Parameter-ratio form of block coordinate descent: a share of every tensor trains, then the next share (BAdam)."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.checks import refuse_torch_checkpoint
from colossal_bcd.block.compiled import CompiledGraphs
from colossal_bcd.block.gradient_checkpointing import keep_checkpoints_whole
from colossal_bcd.block.log import announce
from colossal_bcd.block.parameters import read_parameters
from colossal_bcd.block.ratio.selection import MaskMode, Selected, SelectedSpec, Selection
from colossal_bcd.block.replicas import Averages, averages_for
from colossal_bcd.block.untrained import Reach, warn_of_heads
from colossal_bcd.low_rank.reduced_gradients import ReducedGradientOptimizer
from colossal_bcd.names import Pattern, role_of
from colossal_bcd.optim import State
from colossal_bcd.optim.math import adam_direction_, debiased_rate, direction_numbers, moment_numbers
from colossal_bcd.optim.metrics import Watched
from colossal_bcd.optim.options import require, require_adam
from colossal_bcd.optim.state.spec import StateSpec
from colossal_bcd.optim.state.stack import Member
from colossal_bcd.sharding import Layout, Mesh, Rounds, ShardView, square_sum
from colossal_bcd.sharding.dtensor import is_dtensor


@dataclass(frozen=True, kw_only=True)
class RatioHyper:
    """Hyper-parameters of one param group."""

    lr: float = 1e-5
    """Step size."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment, before it is debiased."""
    weight_decay: float = 0.0
    """Decoupled: values that train shrink by lr * weight_decay."""
    maximize: bool = False
    """Go up the gradient instead of down."""
    update_ratio: float = 0.1
    """Share of each tensor that trains at a time."""
    switch_every: int = 100
    """Optimizer steps until the next share trains."""
    mask_mode: MaskMode = "adjacent"
    """A share is "adjacent" values in the order of memory, or values "scatter"ed at random."""
    preserve_threshold: int = 100
    """Tensors of fewer values train whole, always."""
    seed: int = 0
    """Seed of what is scattered, with the parameter's name."""

    def __post_init__(self) -> None:
        require_adam(self.lr, self.betas, self.eps, self.weight_decay)
        require_ratio("update_ratio", self.update_ratio)
        require(self.switch_every >= 1, "switch_every", self.switch_every, "a positive number of steps")
        modes = ("adjacent", "scatter")
        require(self.mask_mode in modes, "mask_mode", self.mask_mode, '"adjacent" or "scatter"')
        require(self.preserve_threshold >= 0, "preserve_threshold", self.preserve_threshold, "a number of values")


@dataclass(frozen=True, kw_only=True)
class ShareHyper(RatioHyper):
    """Hyper-parameters of one parameter: those of its group, with its own ratio, and which share trains now."""

    name: str
    """Of the parameter."""
    period: int
    """Number of the share, from 0."""
    selected: Selected | None = field(default=None, compare=False, repr=False)
    """In a step: the values that train, found once."""

    def __post_init__(self) -> None:
        """Nothing is left to check: the group's were, and the ratio by its name."""

    def selection(self, numel: int) -> Selection:
        """Which of the values of the global tensor train."""
        whole = numel < self.preserve_threshold or self.update_ratio == 1
        count = numel if whole else int(numel * self.update_ratio)
        offset = 0 if count == numel else self.period * count % max(numel, 1)
        return Selection(numel, count, offset, self.mask_mode, f"{self.seed} {self.name}")


@dataclass(frozen=True, kw_only=True)
class RatioOptions:
    """Further options of a `BlockOptimizerRatio`."""

    optimizer_defaults: Mapping[str, Any] | None = None
    """Instead of `lr`, `betas`, `eps` and `weight_decay`, by name."""
    keep_mask: bool = True
    """Keep the positions of scattered values between steps: 4 bytes each.  Otherwise they are found anew in every step,
    which waits for the device."""
    include_embedding: bool = False
    """Train the embeddings; they are frozen otherwise."""
    include_lm_head: bool = False
    """Train the head; it is frozen otherwise.  One tied to the embedding trains if either is asked for and both names
    are in the list."""
    weight_decay: float = 0.0
    """See `RatioHyper`."""
    seed: int = 0
    """See `RatioHyper`."""
    dense_gradients: bool = False
    """Leave whole gradients in `param.grad`, for what needs them there (torch's gradient scaler, clipping by
    `torch.nn.utils`).  On several processes whole ones are then averaged, not shares."""
    data_group: Any = "auto"
    """See `BlockOptimizer`."""


def require_ratio(name: str, ratio: Any) -> None:
    """Refuse what is no share."""
    require(isinstance(ratio, (int, float)) and 0 <= ratio <= 1, name, ratio, "a number in [0, 1]")


class BlockOptimizerRatio(ReducedGradientOptimizer):
    """Adam on a share of every tensor, the next share after every `switch_every` steps (BAdam's parameter-ratio form).

    Moments exist for the values that train, and start at zero with every share.  Of a gradient these values are kept as
    soon as backward has made it and added up over micro-batches, in float32; `param.grad` is then None.  There are no
    masters on one process: values of bfloat16 weights are updated in float32 and rounded.  `global_step` of a param
    group counts its steps, so that checkpoints have it.

    Args:
        param_groups: as of any optimizer; dicts are kept.
        named_parameters_list: pairs as of `model.named_parameters()`, every parameter of the groups among them.
        update_ratio: as of `RatioHyper`, and so are the other arguments with names of its fields.
        verbose: 0 logs nothing, 1 a line per switch.
        param_update_ratios: pattern of names ("lm_head", "layers.1"; see docs/names.md) -> share of the parameters that
            it matches, instead of `update_ratio`; the last of several that match counts, 0 freezes.
        flat: the fields of `RatioOptions`, by name.
    Raises:
        TypeError: an argument is unknown.
        ValueError: an argument is out of range, a parameter of the groups has no name, a name in `param_update_ratios`
            matches none, or a tensor is so small that none of its values would ever train.
    """

    hyper_type = RatioHyper
    temporary_bytes = 0

    def __init__(
        self,
        param_groups: Iterable[Any],
        named_parameters_list: Iterable[tuple[str, Parameter]],
        update_ratio: float = 0.1,
        verbose: int = 1,
        switch_every: int = 100,
        preserve_threshold: int = 100,
        param_update_ratios: Mapping[str, float] | None = None,
        mask_mode: MaskMode = "adjacent",
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **flat: Any,
    ) -> None:
        options = RatioOptions(**flat)
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": options.weight_decay}
        defaults = options.optimizer_defaults or {}
        unknown = set(defaults) - adam.keys()
        require(not unknown, "optimizer_defaults", sorted(unknown), f"some of {', '.join(adam)}")
        hyper = RatioHyper(
            **{**adam, **defaults},
            update_ratio=update_ratio,
            switch_every=switch_every,
            mask_mode=mask_mode,
            preserve_threshold=preserve_threshold,
            seed=options.seed,
        )
        model = read_parameters(named_parameters_list)
        sharded = next((name for name, param in model.parameters.items() if is_dtensor(param)), None)
        if sharded is not None:
            raise ValueError(
                f"BlockOptimizerRatio: parameter {sharded!r} is a DTensor of which this process has a part, expected "
                "whole parameters. Use a BlockOptimizer with colossal_bcd.fsdp.attach, or booster.boost with a plugin "
                "of colossal_bcd.booster, which shards what trains."
            )
        self._names = {param: name for name, param in model.parameters.items()}
        # Of several patterns that match a name the last one counts.
        self._ratios: dict[str, float] = {}
        for text, ratio in (param_update_ratios or {}).items():
            require_ratio(f"param_update_ratios[{text!r}]", ratio)
            found = Pattern(text, subject="param_update_ratios").select(model.parameters)
            self._ratios.update(dict.fromkeys(found, ratio))
        self._named: dict[int, str] = {}
        self._group_of: dict[int, int] = {}
        self._cache: dict[tuple[Layout, Selection], Selected] = {}
        self._lent = False
        self._handles: list[Any] = []
        self._reach = Reach("layer")
        self._data_group, self._bound = options.data_group, False
        self._replicas: Averages | None = None
        self.verbose, self.keep_mask, self.dense_gradients = verbose, options.keep_mask, options.dense_gradients
        super().__init__(param_groups, **vars(hyper))
        kinds = {"embedding": options.include_embedding, "head": options.include_lm_head}
        aliases: dict[str, list[str]] = {}
        for alias, name in model.aliases.items():
            aliases.setdefault(name, []).append(alias)
        frozen = set()
        for param in self._params():
            name = self._names[param]
            asked = [kinds.get(role_of(each).kind, True) for each in (name, *aliases.get(name, []))]
            if not any(asked) or self._ratios.get(name, update_ratio) == 0:
                if param.requires_grad and not any(asked):
                    frozen.add(name)
                param.requires_grad_(False)
        warn_of_heads(model.parameters, frozen, "include_lm_head=True")
        self._names = {}
        keep_checkpoints_whole()
        CompiledGraphs().renew(list(model.parameters.values()), 1)
        if not self._find_replicas() and not self.dense_gradients:
            trained = [param for param in self._params() if param.requires_grad]
            self._handles = [param.register_post_accumulate_grad_hook(self._keep_selected) for param in trained]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group.get("amsgrad"):
            raise ValueError(
                "BlockOptimizerRatio: got a param group with amsgrad=True, expected Adam. Set it to False."
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("global_step", 0)
        for param in group["params"]:
            key = self._keys[param]
            if param not in self._names:
                raise ValueError(
                    f"BlockOptimizerRatio: parameter {key} of shape {tuple(param.shape)} is not in "
                    "named_parameters_list, expected its name there. Pass list(model.named_parameters())."
                )
            self._named[key], self._group_of[key] = self._names[param], len(self.param_groups) - 1
            hyper = self.hyper_of(group, key)
            if hyper.update_ratio > 0 and hyper.selection(param.numel()).count == 0 < param.numel():
                raise ValueError(
                    f"update_ratio={hyper.update_ratio} of the {param.numel()} values of {hyper.name!r} is less than "
                    "one, so that none would ever train. Raise preserve_threshold above its size, or the ratio."
                )

    def bind(self, layouts: Mapping[Tensor, Layout], mesh: Mesh, keys: Mapping[Tensor, int] | None = None) -> None:
        super().bind(layouts, mesh, keys)
        # Whoever binds feeds gradients of its own.
        self._bound = True
        if self._replicas is not None:
            self._replicas.detach()
            self._replicas = None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def hyper_of(self, group: Mapping[str, Any], key: int | None = None) -> Any:
        hyper = super().hyper_of(group)
        return hyper if key is None else self._share(hyper, group["global_step"], key)

    @property
    def is_elementwise(self) -> bool:
        return False

    @property
    def state(self) -> Any:
        """Moments of the values that train, by parameter."""
        refuse_torch_checkpoint(type(self).__name__, "Use torch.save(optimizer.state_dict(), path).")
        return self.__dict__["state"]

    @state.setter
    def state(self, value: Any) -> None:
        self.__dict__["state"] = value

    def state_spec(self, layout: Layout, hyper: ShareHyper) -> dict[str, StateSpec]:
        selected = self._selected(layout, hyper)
        moment = SelectedSpec(kind="entries", shape=(len(selected),), selection=selected.selection)
        return {"exp_avg": moment, "exp_avg_sq": moment}

    def update(self, view: ShardView, state: State, hyper: ShareHyper) -> Rounds:
        """Adam on the values that train; asks nothing of other ranks."""
        selected, grad = self._selected(view.layout, hyper), self.take_low_rank(view.keys[0])
        grad = selected.take(view.grad) if grad is None else grad
        numbers = {**moment_numbers(hyper.betas), **direction_numbers(hyper.betas, hyper.eps, None)}
        grad = grad.neg() if hyper.maximize else grad
        direction = adam_direction_(state["exp_avg"], state["exp_avg_sq"], grad, **numbers)
        lr = debiased_rate(hyper.lr, state.step, hyper.betas)
        values = selected.take(view.param).mul_(1 - hyper.lr * hyper.weight_decay)
        selected.put(view.param, values.add_(direction, alpha=-lr))
        yield from ()

    def wants_low_rank(self, layout: Layout, state: Mapping[str, Any], hyper: ShareHyper, key: int) -> Any:
        return self._selected(layout, hyper)

    def low_rank_wanted(self) -> dict[Tensor, Any]:
        """All parameters: what trains in the next step is known, also before the first one."""
        self._lent = True
        return {
            param: self._selected(self._layouts[param], self.hyper_of(group, self._keys[param]), param.device)
            for group in self.param_groups
            for param in group["params"]
        }

    def watched(self) -> list[Watched]:
        return [each._replace(name=self._named[self._keys[each.tensor]]) for each in super().watched()]

    def gradient_of(self, param: Tensor) -> Tensor | None:
        return param.grad if self.dense_gradients else None

    def _update(self) -> None:
        if self._find_replicas():
            assert self._replicas is not None
            self._replicas.settle()
        super()._update()
        self._given.clear()
        if not (self.keep_mask or self._lent):
            self._cache.clear()
        switched = set()
        for group in self.param_groups:
            group["global_step"] += 1
            if group["global_step"] % group["switch_every"] == 0:
                switched.add(group["global_step"])
                for param in group["params"]:
                    self.state.pop(param, None)
                self._forget()
        if switched and self._replicas is not None:
            self._replicas.agree()
            self._average_shares()
        if self.verbose:
            for num_steps in sorted(switched):
                announce(f"step {num_steps}: the next share of every tensor trains")

    def _active(self) -> list[Member]:
        members = super()._active()
        self._note_reach({member.param for member in members})
        shares = []
        for member in members:
            share = self._share(member.hyper, self.param_groups[member.group]["global_step"], member.key)
            selected = self._selected(member.layout, share, member.param.device)
            shares.append(replace(member, hyper=replace(share, selected=selected)))
        return shares

    def _grad(self, param: Tensor) -> Tensor | None:
        """The gradient, or what has been kept of it; one of the two says that there is one."""
        grad, kept = super()._grad(param), self._given.get(self._keys.get(param, -1))
        if kept is None or self._bound:
            return grad
        if grad is not None:
            raise ValueError(
                f"{self._named[self._keys[param]]}: something wrote the gradient after backward had made it, expected "
                "nobody to. Pass dense_gradients=True."
            )
        return kept

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._given.clear()
        if self._replicas is not None:
            self._replicas.clear()
        super().zero_grad(set_to_none)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip what has been kept of the gradients, by its norm; to be called before `step`.

        Args:
            max_norm: largest Euclidean norm.
        Returns:
            The norm before clipping.
        Raises:
            ValueError: gradients are elsewhere: `dense_gradients`, or a plugin has them, which clips by its own norm.
        """
        grads = list(self._given.values())
        if not grads:
            raise ValueError(
                "clip_grad_norm_: nothing has been kept of gradients, expected something from backward. With "
                "dense_gradients clip with torch.nn.utils, under a plugin give it max_norm=... instead."
            )
        norm = torch.stack([square_sum(grad) for grad in grads]).sum().sqrt()
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.renew()

    def renew(self) -> None:
        """Find what trains anew, after somebody wrote the progress of the groups."""
        self._forget()
        if self._replicas is not None:
            self._average_shares()

    def replica_names(self) -> Mapping[Parameter, str]:
        """See `ReplicaClient`."""
        return {param: self._named[self._keys[param]] for param in self._params()}

    def fingerprint(self) -> list[int]:
        """Two 62-bit ints: of what trains, and of the progress in it.  Equal on ranks that agree."""
        hypers = [{**vars(self.hyper_of(group)), "lr": None} for group in self.param_groups]
        progress = [group["global_step"] for group in self.param_groups]
        digests = (hashlib.sha256(repr(value).encode()).digest() for value in ((hypers, self._ratios), progress))
        return [int.from_bytes(digest[:8], "big") >> 2 for digest in digests]

    def take_averages(self, averages: Mapping[Parameter, Tensor]) -> None:
        """See `ReplicaClient`."""
        for param, values in averages.items():
            if self.dense_gradients:
                param.grad = values.view(param.shape)
            else:
                self._add_up(self._keys[param], values)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no hooks on its parameters, and so takes whole gradients.
        names = ("_named", "_ratios", "_group_of", "verbose", "keep_mask", "dense_gradients", "_bound")
        fresh: dict[str, Any] = {"_cache": {}, "_lent": False, "_names": {}, "_handles": [], "_replicas": None}
        fresh.update(_reach=Reach("layer"), _data_group=None if self._data_group is None else "auto")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}, **fresh}

    def _params(self) -> Iterator[Parameter]:
        return (param for group in self.param_groups for param in group["params"])

    def _find_replicas(self) -> bool:
        """Whether there are several processes without an engine, whose gradients are then averaged."""
        if self._replicas is not None or self._bound:
            return self._replicas is not None
        self._replicas = averages_for(self, self._data_group)
        if self._replicas is None:
            return False
        if self._handles and self._given:
            raise ValueError(
                "BlockOptimizerRatio: got a process group of several processes after gradients had been made on this "
                "process alone, expected it before the optimizer. Call torch.distributed.init_process_group first."
            )
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._average_shares()
        return True

    def _average_shares(self) -> None:
        """From now on average what trains until the next switch, or whole gradients."""
        assert self._replicas is not None
        trained = [param for param in self._params() if param.requires_grad]
        wanted = {} if self.dense_gradients else self.low_rank_wanted()
        self._replicas.activate(trained, low_rank={param: wanted[param] for param in trained if param in wanted})

    def _forget(self) -> None:
        """Find what trains anew when it is needed."""
        self._cache.clear()
        self._given.clear()

    def _note_reach(self, stepped: Collection[Tensor]) -> None:
        """Look at a step: which of the parameters that train have a gradient, by name."""
        layers: dict[str, dict[str, bool]] = {}
        others = False
        for param in self._params():
            present, name = param in stepped, self._named[self._keys[param]]
            if (layer := role_of(name).layer) is None:
                others |= present
            elif present or param.requires_grad or not isinstance(param, Parameter):
                layers.setdefault(layer, {})[name] = present
        first = self.param_groups[0]
        self._reach.note(first["global_step"], layers, others)
        if layers and (first["global_step"] + 1) % first["switch_every"] == 0:
            self._reach.end(layers, list(layers))

    @torch.no_grad()
    def _keep_selected(self, param: Tensor) -> None:
        """Add the values of a gradient that train to what other micro-batches have left, as soon as it is made."""
        if param.grad is None or param.grad.layout != torch.strided:
            return
        key = self._keys[param]
        hyper = self.hyper_of(self.param_groups[self._group_of[key]], key)
        values = self._selected(self._layouts[param], hyper, param.device).take(param.grad.reshape(-1))
        param.grad = None
        self._add_up(key, values)

    def _share(self, hyper: RatioHyper, num_steps: int, key: int) -> ShareHyper:
        """Hyper-parameters of one parameter after so many steps."""
        name = self._named[key]
        values = {**vars(hyper), "update_ratio": self._ratios.get(name, hyper.update_ratio)}
        return ShareHyper(**values, name=name, period=num_steps // hyper.switch_every)

    def _add_up(self, key: int, values: Tensor) -> None:
        if key in self._given:
            self._given[key].add_(values)
        else:
            self._given[key] = values

    def _selected(self, layout: Layout, hyper: ShareHyper, device: torch.device | None = None) -> Selected:
        """Which values of a parameter train; kept where they are looked for on a `device`, to be used."""
        if hyper.selected is not None:
            return hyper.selected
        selection = hyper.selection(layout.numel)
        selected = self._cache.get((layout, selection))
        if selected is None:
            selected = Selected(layout, selection, device or torch.device("cpu"))
            if device is not None:
                self._cache[layout, selection] = selected
        return selected
