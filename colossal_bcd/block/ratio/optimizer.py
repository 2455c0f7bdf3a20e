"""Parameter-ratio form of block coordinate descent: a share of every tensor trains, then the next share (BAdam).

n: values of data on this rank; k: those of them that train.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from colossal_bcd.block.compiled import CompiledGraphs
from colossal_bcd.block.gradient_checkpointing import keep_checkpoints_whole
from colossal_bcd.block.heads import warn_of_heads
from colossal_bcd.block.log import announce
from colossal_bcd.block.parameters import read_parameters
from colossal_bcd.block.ratio.rule import KeyedLayout, RatioHyper, adam_on, require_ratio
from colossal_bcd.block.ratio.selection import MaskMode, Selected, SelectedGradient, SelectedSpec, Selection
from colossal_bcd.block.reached import Reach
from colossal_bcd.block.replicas import Averages, averages_for
from colossal_bcd.block.torch_checkpoint import refuse_torch_checkpoint
from colossal_bcd.low_rank.reduced_gradients import ReducedGradientOptimizer
from colossal_bcd.names import Pattern, role_of
from colossal_bcd.optim.base import State
from colossal_bcd.optim.functional import require
from colossal_bcd.optim.state.spec import StateSpec
from colossal_bcd.sharding import Layout, Mesh, Rounds, ShardView, square_sum


class BlockOptimizerRatio(ReducedGradientOptimizer):
    """Adam on a share of every tensor, the next share after every `switch_every` steps (BAdam's parameter-ratio form).

    Moments exist for the entries that train, and start at zero with every share.  Gradients are cut down to these
    entries as soon as backward has made them and added up over micro-batches, in float32; `param.grad` is then None.
    There are no masters on one process: entries of bfloat16 weights are updated in float32 and rounded.

    Args:
        param_groups: as of any optimizer; dicts are kept.
        named_parameters_list: pairs as of `model.named_parameters()`, every parameter of the groups among them.
        update_ratio, switch_every, mask_mode, preserve_threshold, lr, betas, eps, weight_decay, seed: see `RatioHyper`.
        verbose: 0 logs nothing, 1 a line per switch.
        param_update_ratios: pattern of names ("lm_head", "layers.1"; see docs/names.md) -> share of the parameters that
            it matches, instead of `update_ratio`; the last of several that match counts, 0 freezes.
        optimizer_defaults: instead of `lr`, `betas`, `eps` and `weight_decay`, by name.
        keep_mask: keep the places of scattered entries between steps: 4 bytes each.  Otherwise they are found anew in
            every step.
        include_embedding: train the embeddings; they are frozen otherwise.
        include_lm_head: train the head; it is frozen otherwise.  One tied to the embedding trains if either is asked
            for and both names are in the list.
        dense_gradients: leave whole gradients in `param.grad`, for what needs them there (torch's gradient scaler,
            clipping by `torch.nn.utils`).  On several processes whole ones are then averaged, not shares.
        data_group: see `BlockOptimizer`.
    Raises:
        ValueError: an argument is out of range, a parameter of the groups has no name, a name in `param_update_ratios`
            matches none, or a tensor is so small that none of its entries would ever train.
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
        optimizer_defaults: Mapping[str, Any] | None = None,
        keep_mask: bool = True,
        include_embedding: bool = False,
        include_lm_head: bool = False,
        *,
        weight_decay: float = 0.0,
        seed: int = 0,
        dense_gradients: bool = False,
        data_group: Any = "auto",
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        unknown = set(optimizer_defaults or {}) - adam.keys()
        require(not unknown, "optimizer_defaults", sorted(unknown), f"some of {', '.join(adam)}")
        hyper = RatioHyper(
            **{**adam, **(optimizer_defaults or {})},
            update_ratio=update_ratio,
            switch_every=switch_every,
            mask_mode=mask_mode,
            preserve_threshold=preserve_threshold,
            seed=seed,
        )
        roster = read_parameters(named_parameters_list)
        self._names = {param: name for name, param in roster.parameters.items()}
        # Of several patterns that match a name the last one counts.
        self._ratios: dict[str, float] = {}
        for text, ratio in (param_update_ratios or {}).items():
            require_ratio(f"param_update_ratios[{text!r}]", ratio)
            found = Pattern(text, subject="param_update_ratios").select(roster.parameters)
            self._ratios.update(dict.fromkeys(found, ratio))
        self._named: dict[int, str] = {}
        self._group_of: dict[int, int] = {}
        self._devices: dict[int, torch.device] = {}
        self._images_wanted: dict[int, SelectedGradient] = {}
        self._cache: dict[int, Selected] = {}
        self._compact: dict[int, Tensor] = {}
        self._handles: list[Any] = []
        self._reach = Reach("layer")
        self._data_group, self._bound = data_group, False
        self._replicas: Averages | None = None
        self.verbose, self.keep_mask, self.dense_gradients = verbose, keep_mask, dense_gradients
        super().__init__(param_groups, hyper)
        kinds = {"embedding": include_embedding, "head": include_lm_head}
        aliases: dict[str, list[str]] = {}
        for alias, name in roster.aliases.items():
            aliases.setdefault(name, []).append(alias)
        frozen = set()
        for param in self._params():
            name = self._names[param]
            asked = [kinds.get(role_of(each).kind, True) for each in (name, *aliases.get(name, []))]
            if not any(asked) or self._ratio(name, update_ratio) == 0:
                if param.requires_grad and not any(asked):
                    frozen.add(name)
                param.requires_grad_(False)
        warn_of_heads(roster.parameters, frozen, "include_lm_head=True")
        self._names = {}
        keep_checkpoints_whole()
        CompiledGraphs().renew(list(roster.parameters.values()), 1)
        if not self._find_replicas() and not dense_gradients:
            trained = [param for param in self._params() if param.requires_grad]
            self._handles = [param.register_post_accumulate_grad_hook(self._keep_entries) for param in trained]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group.get("amsgrad"):
            raise ValueError(
                "BlockOptimizerRatio: got a param group with amsgrad=True, expected Adam. Set it to False."
            )
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            key = self._keys[param]
            if param not in self._names:
                raise ValueError(
                    f"BlockOptimizerRatio: parameter {key} of shape {tuple(param.shape)} is not in "
                    "named_parameters_list, expected its name there. Pass list(model.named_parameters())."
                )
            self._named[key], self._group_of[key] = self._names[param], len(self.param_groups) - 1
            self._layouts[param] = KeyedLayout.of(self._layouts[param], key)
            self._require_entries(param, self.hyper_of(self.param_groups[-1]))

    def bind(self, layouts: Mapping[Tensor, Layout], mesh: Mesh, keys: Mapping[Tensor, int] | None = None) -> None:
        super().bind(layouts, mesh, keys)
        self._layouts = {param: KeyedLayout.of(layout, self._keys[param]) for param, layout in self._layouts.items()}
        # Whoever binds feeds gradients of its own.
        self._bound = True
        if self._replicas is not None:
            self._replicas.detach()
            self._replicas = None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._devices = {key: param.device for param, key in self._keys.items()}
        self._forget()

    @property
    def is_elementwise(self) -> bool:
        return False

    @property
    def state(self) -> Any:
        """Moments of the entries that train, by parameter."""
        refuse_torch_checkpoint(type(self).__name__, "Use torch.save(optimizer.state_dict(), path).")
        return self.__dict__["state"]

    @state.setter
    def state(self, value: Any) -> None:
        self.__dict__["state"] = value

    def state_spec(self, layout: Layout, hyper: RatioHyper) -> dict[str, StateSpec]:
        selection = self._selection(layout, hyper)
        count = len(Selected(layout, selection, torch.device("cpu")))
        moment = SelectedSpec(kind="entries", shape=(count,), selection=selection)
        return {"exp_avg": moment, "exp_avg_sq": moment}

    def update(self, view: ShardView, state: State, hyper: RatioHyper) -> Rounds:
        """Asks nothing of other ranks; `step` does the work, on the entries that train."""
        yield from ()

    def wants_low_rank(self, layout: Layout, state: State, hyper: RatioHyper, key: int) -> Any:
        if key not in self._images_wanted:
            self._images_wanted[key] = SelectedGradient(layout, self._selection(layout, hyper), self._devices[key])
        return self._images_wanted[key]

    def low_rank_wanted(self) -> dict[Tensor, Any]:
        """All parameters: what trains in the next step is known, also before the first one."""
        return {
            param: self.wants_low_rank(self._layouts[param], {}, self.hyper_of(group), self._keys[param])
            for group in self.param_groups
            for param in group["params"]
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = self._closure_loss(closure)
        if self._find_replicas():
            assert self._replicas is not None
            self._replicas.settle()
        self._active()  # raises where a gradient or a tensor is not what it should be
        had = {}
        for group in self.param_groups:
            hyper = self.hyper_of(group)
            for param in group["params"]:
                stepped = self._step_one(param, hyper)
                if stepped or param.requires_grad or not isinstance(param, Parameter):
                    had[self._named[self._keys[param]]] = stepped
        self._note_reach(had)
        self._compact.clear()
        if not self.keep_mask:
            self._cache.clear()
        switched = set()
        for group in self.param_groups:
            group["global_step"] += 1
            if group["global_step"] % group["switch_every"] == 0:
                self._switch(group)
                switched.add(group["global_step"])
        if switched and self._replicas is not None:
            self._replicas.agree()
            self._average_shares()
        if self.verbose:
            for num_steps in sorted(switched):
                announce(f"step {num_steps}: the next share of every tensor trains")
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._compact.clear()
        if self._replicas is not None:
            self._replicas.clear()
        super().zero_grad(set_to_none)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients that were cut down to the entries that train, by their norm; to be called before `step`.

        Args:
            max_norm: largest Euclidean norm.
        Returns:
            The norm before clipping.
        Raises:
            ValueError: gradients are elsewhere: `dense_gradients`, or a plugin has them, which clips by its own norm.
        """
        grads = list(self._compact.values())
        if not grads:
            raise ValueError(
                "clip_grad_norm_: there are no gradients of entries, expected some from backward. With dense_gradients "
                "clip with torch.nn.utils, under a plugin give it max_norm=... instead."
            )
        norm = torch.stack([square_sum(grad) for grad in grads]).sum().sqrt()
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._forget()
        if self._replicas is not None:
            self._average_shares()

    def replica_names(self) -> Mapping[Parameter, str]:
        """See `ReplicaClient`."""
        return {param: self._named[self._keys[param]] for param in self._params()}

    def fingerprint(self) -> list[int]:
        """Two 62-bit ints: of what trains, and of the progress in it.  Equal on ranks that agree."""
        hypers = [{**dataclasses.asdict(self.hyper_of(group)), "lr": None} for group in self.param_groups]
        progress = [hyper.pop("global_step") for hyper in hypers]
        digests = (hashlib.sha256(repr(value).encode()).digest() for value in ((hypers, self._ratios), progress))
        return [int.from_bytes(digest[:8], "big") >> 2 for digest in digests]

    def take_averages(self, averages: Mapping[Parameter, Tensor]) -> None:
        """See `ReplicaClient`."""
        for param, values in averages.items():
            key = self._keys[param]
            if self.dense_gradients:
                param.grad = values.view(param.shape)
            elif key in self._compact:
                self._compact[key].add_(values)
            else:
                self._compact[key] = values

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no hooks on its parameters, and so takes whole gradients.
        names = ("_named", "_ratios", "_group_of", "_devices", "verbose", "keep_mask", "dense_gradients", "_bound")
        fresh: dict[str, Any] = {"_cache": {}, "_compact": {}, "_images_wanted": {}, "_names": {}, "_handles": []}
        fresh["_reach"] = Reach("layer")
        fresh.update(_replicas=None, _data_group=None if self._data_group is None else "auto")
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
        if self._handles and self._compact:
            raise ValueError(
                "BlockOptimizerRatio: got a process group of several processes after gradients had been cut down on "
                "this process alone, expected it before the optimizer. Call torch.distributed.init_process_group first."
            )
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._average_shares()
        return True

    def _average_shares(self) -> None:
        """From now on average what trains until the next switch, or whole gradients."""
        assert self._replicas is not None
        self._devices = {key: param.device for param, key in self._keys.items()}
        trained = [param for param in self._params() if param.requires_grad]
        wanted = {} if self.dense_gradients else self.low_rank_wanted()
        self._replicas.activate(trained, images={param: wanted[param] for param in trained if param in wanted})

    def _forget(self) -> None:
        """Masks are made again when they are needed."""
        self._cache.clear()
        self._images_wanted.clear()
        self._compact.clear()

    def _switch(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            self.state.pop(param, None)
        self._forget()

    def _note_reach(self, had: Mapping[str, bool]) -> None:
        """Look at a step: which of the parameters that train had a gradient, by name."""
        layers: dict[str, dict[str, bool]] = {}
        for name, present in had.items():
            if (layer := role_of(name).layer) is not None:
                layers.setdefault(layer, {})[name] = present
        others = any(present for name, present in had.items() if role_of(name).layer is None)
        first = self.param_groups[0]
        self._reach.note(first["global_step"], layers, others)
        if layers and (first["global_step"] + 1) % first["switch_every"] == 0:
            self._reach.end(layers, list(layers))

    def _step_one(self, param: Tensor, hyper: RatioHyper) -> bool:
        """Adam on the entries of one parameter that train; whether it has a gradient."""
        key, layout = self._keys[param], self._layouts[param]
        grad = self.take_low_rank(key)
        if grad is None:
            grad = self._compact.pop(key, None)
            if grad is not None and param.grad is not None:
                raise ValueError(
                    f"{self._named[key]}: something wrote the gradient after backward had made it, expected nobody "
                    "to. Pass dense_gradients=True."
                )
        if grad is None and param.grad is None:
            return False
        entries = self._entries(key, layout, hyper, param.device)
        local = param.detach().contiguous()
        flat = local.view(-1)[: layout.num_local]
        if grad is None:
            assert param.grad is not None
            grad = entries.take(param.grad.reshape(-1)[: layout.num_local])
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
        state["step"] += 1
        entries.put(flat, adam_on(entries.take(flat), grad, state, hyper))
        if not param.is_contiguous():
            param.copy_(local)
        return True

    @torch.no_grad()
    def _keep_entries(self, param: Tensor) -> None:
        """Of a gradient that backward has just made: the entries that train, added to those of other micro-batches."""
        if param.grad is None or param.grad.layout != torch.strided:
            return
        key = self._keys[param]
        hyper = self.hyper_of(self.param_groups[self._group_of[key]])
        entries = self._entries(key, self._layouts[param], hyper, param.device)
        grad = entries.take(param.grad.reshape(-1))
        param.grad = None
        if key in self._compact:
            self._compact[key].add_(grad)
        else:
            self._compact[key] = grad

    def _entries(self, key: int, layout: Layout, hyper: RatioHyper, device: torch.device) -> Selected:
        wanted = self._images_wanted.get(key)
        if wanted is not None and layout.slice is None:
            return wanted.shard
        if key not in self._cache:
            self._cache[key] = Selected(layout, self._selection(layout, hyper), device)
        return self._cache[key]

    def _selection(self, layout: Layout, hyper: RatioHyper) -> Selection:
        """What of the parameter trains after `hyper.global_step` steps."""
        assert isinstance(layout, KeyedLayout)
        name, numel = self._named[layout.key], layout.numel
        ratio = self._ratio(name, hyper.update_ratio)
        count = numel if numel < hyper.preserve_threshold or ratio == 1 else int(numel * ratio)
        offset = 0 if count == numel else hyper.global_step // hyper.switch_every * count % max(numel, 1)
        return Selection(numel, count, offset, hyper.mask_mode, f"{hyper.seed} {name}")

    def _require_entries(self, param: Tensor, hyper: RatioHyper) -> None:
        name = self._named[self._keys[param]]
        selection = self._selection(self._layouts[param], hyper)
        if selection.count == 0 < selection.numel and self._ratio(name, hyper.update_ratio) > 0:
            raise ValueError(
                f"update_ratio={self._ratio(name, hyper.update_ratio)} of the {selection.numel} values of {name!r} is "
                "less than one, so that none would ever train. Raise preserve_threshold above its size, or the ratio."
            )

    def _ratio(self, name: str, default: float) -> float:
        return self._ratios.get(name, default)
