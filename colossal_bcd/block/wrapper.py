"""An optimizer around another one: the same param groups, and what it says about its blocks."""

from __future__ import annotations

from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

from colossal_bcd.block.active_set import ActiveSet, load_state
from colossal_bcd.block.partition import Block
from colossal_bcd.block.plan import Plan
from colossal_bcd.block.schedule import Schedule
from colossal_bcd.block.torch_checkpoint import refuse_torch_checkpoint
from colossal_bcd.optim.foreign.bitsandbytes_states import remember_weights
from colossal_bcd.optim.foreign.contract import Contract, examine
from colossal_bcd.optim.foreign.twin import copied

NO_NEWCOMERS = (
    "add_param_group: got parameters after the blocks were made, expected none. Add them to the base optimizer before "
    "it is wrapped."
)


class Wrapper(Optimizer):
    """Shares param groups and state with its base optimizer, and answers questions about a plan.

    Args:
        base_optimizer: the optimizer inside.
        plan: which parameters train when.
        named_parameters: canonical name -> trainable parameter.
    """

    base_optimizer: Optimizer

    def __init__(self, base_optimizer: Optimizer, plan: Plan, named_parameters: dict[str, Parameter]) -> None:
        # The empty group satisfies torch's constructor without a change to the base optimizer's groups.
        super().__init__([{"params": []}], base_optimizer.defaults)
        self.plan = plan
        """What trains at which step."""
        self.num_steps = 0
        """Applied steps."""
        self.named_parameters = named_parameters
        """Canonical name -> every parameter on this rank that was left trainable, whether in a block or not."""
        self.members: list[list[Parameter]] = [list(group["params"]) for group in base_optimizer.param_groups]
        """Parameters of each param group as the base optimizer was given them, active or not."""
        self._tenants = ActiveSet()
        self._adopt(base_optimizer)

    @property
    def contract(self) -> Contract:
        """What the base optimizer keeps, and where."""
        return self._tenants.contract

    @property
    def state(self) -> Any:
        """State of the base optimizer, by what its groups hold."""
        refuse_torch_checkpoint(type(self).__name__, "Use torch.save(optimizer.state_dict(), path).")
        return self.__dict__["state"]

    @state.setter
    def state(self, value: Any) -> None:
        self.__dict__["state"] = value

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.plan.blocks

    @property
    def schedule(self) -> Schedule:
        return self.plan.schedule

    @property
    def always_active(self) -> tuple[str, ...]:
        """Canonical names of the parameters of `active_modules`, in model order."""
        return self.plan.always_active

    def active_blocks(self) -> tuple[Block, ...]:
        """The blocks that train now, one per range."""
        return self.plan.active_blocks(self.num_steps)

    def active_names(self) -> tuple[str, ...]:
        """Canonical names of the parameters that train now, on any rank, those of `active_modules` included."""
        return self.plan.active_names(self.num_steps)

    def corrected_names(self) -> tuple[str, ...]:
        """Canonical names of the parameters that are corrected now, on any rank."""
        return self.plan.corrected_names(self.num_steps)

    def identity(self) -> dict[str, Any]:
        """What says which parameters train at which step: plain numbers, strings, lists."""
        return self.plan.identity()

    def fingerprint(self) -> list[int]:
        """Two 62-bit ints: of the blocks and their schedule, and of the progress in it.  Equal on ranks that agree."""
        return self.plan.fingerprint(self.num_steps)

    def group_names(self, num_steps: int) -> list[list[str]]:
        """Names of the parameters held by each param group after `num_steps` applied steps, in order."""
        active = set(self.plan.active_names(num_steps))
        names = {param: name for name, param in self.named_parameters.items() if name in active}
        return [[names[param] for param in members if param in names] for members in self.members]

    def replace_base(self, base_optimizer: Optimizer) -> None:
        """Go on with another base optimizer over the same param-group dicts.

        Raises:
            ValueError: the present one has state, or the groups are others.
        """
        old = self.base_optimizer
        same = len(old.param_groups) == len(base_optimizer.param_groups) and all(
            ours is theirs for ours, theirs in zip(old.param_groups, base_optimizer.param_groups, strict=True)
        )
        if self._tenants.has_stepped(old) or not same:
            raise ValueError(
                f"replace_base: got a {type(base_optimizer).__name__} while the {type(old).__name__} has state of "
                f"{len(old.state)} parameters and {'the same' if same else 'other'} param groups; expected no state "
                "and the same group dicts. Replace it before the first step."
            )
        self._adopt(base_optimizer)

    def states_aside(self) -> dict[Parameter, Any]:
        """State of kept parameters that do not train now."""
        return self._tenants.aside

    def put_aside(self, states: dict[Parameter, Any]) -> None:
        """Replace what `states_aside` returns."""
        self._tenants.aside = states

    def base_attributes(self) -> dict[str, Any]:
        """What the base optimizer's steps have written on the object, by name."""
        written = self.contract.attributes
        return {name: copied(vars(self.base_optimizer)[name]) for name in written if name in vars(self.base_optimizer)}

    def set_base_attributes(self, attributes: dict[str, Any]) -> None:
        """Write again what `base_attributes` returned."""
        vars(self.base_optimizer).update(copied(attributes))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group["params"]:
            raise ValueError(NO_NEWCOMERS)
        super().add_param_group(param_group)

    def require_no_newcomers(self) -> None:
        """Refuse parameters that were given to the base optimizer itself, which no block has.

        Raises:
            ValueError: there are some.
        """
        held = {id(tensor) for tensor in self._tenants.tensors.values()}
        if any(id(tensor) not in held for group in self.param_groups for tensor in group["params"]):
            raise ValueError(NO_NEWCOMERS)

    def load_base_state(self, state_dict: dict[str, Any]) -> None:
        """Load the base optimizer's own state dict, keeping the group dicts that schedulers hold."""
        load_state(self.base_optimizer, state_dict)
        self.state = self.base_optimizer.state

    def _adopt(self, base_optimizer: Optimizer) -> None:
        self._tenants.contract = examine(base_optimizer)
        self.base_optimizer, self.defaults = base_optimizer, base_optimizer.defaults
        self.param_groups, self.state = base_optimizer.param_groups, base_optimizer.state
        remember_weights(base_optimizer, self.members)
        self._get_lr = getattr(base_optimizer, "_get_lr", None)  # transformers' AdafactorSchedule calls it
