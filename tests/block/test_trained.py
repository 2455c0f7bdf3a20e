"""One kind of optimizer: a base optimizer and a plan; a plain one has a plan of one block that never switches."""

import ast
from pathlib import Path

import torch
from block_net import Net, adamw, wrap

import colossal_bcd
from colossal_bcd import BlockOptimizer
from colossal_bcd.block.active_set import ActiveSet
from colossal_bcd.block.plan import Plan
from colossal_bcd.block.trained import Trained, is_plain, trained_of

PACKAGE = Path(colossal_bcd.__file__).parent


def test_plan_of_everything_is_one_block_that_never_switches() -> None:
    plan = Plan.whole(["a", "b"])
    assert plan.is_whole
    for num_steps in (0, 1, 10**9):
        assert plan.active_names(num_steps) == ("a", "b")
        assert not plan.schedule.is_switch(num_steps)
    assert plan.corrected_names(0) == ()
    assert plan.trained() == {"a", "b"}


def test_trained_of_a_plain_optimizer_tells_what_a_block_optimizer_tells() -> None:
    model = Net()
    base = adamw(model)
    names = {id(param): name for name, param in model.named_parameters()}
    plain = trained_of(base, names)
    assert is_plain(base)
    assert is_plain(None)
    assert plain.plan.is_whole
    assert plain.base_optimizer is base
    assert plain.group_names(0) == [list(names.values())]
    assert plain.keys() == {key: number for number, key in enumerate(names)}
    assert plain.parameters() == list(model.parameters())
    assert not plain.switch_if_due()

    optimizer = wrap(model, base)
    assert not is_plain(optimizer)
    assert trained_of(optimizer) is optimizer
    assert optimizer.keys() == plain.keys()
    assert optimizer.parameters() == plain.parameters()


def test_active_set_keeps_what_survives_and_makes_the_rest_anew() -> None:
    """Masters and state of kept parameters survive, active or aside; all others are freed and made from the weights."""

    class Maker:
        def make_master(self, param):
            return param.detach().clone()

        def weight_of(self, param):
            return param

        def follow(self, param, master):
            raise AssertionError

    first, second, kept = (torch.nn.Parameter(torch.full((2,), float(value))) for value in range(3))
    base = torch.optim.SGD([first, second, kept], lr=1.0, momentum=0.5)
    active, maker = ActiveSet(), Maker()
    active.begin_anew(maker)
    active.activate(base, [[first, kept]], frozenset())
    masters = dict(active.masters)
    for master in masters.values():
        master.grad = torch.ones(2)
    base.step()
    state = base.state[masters[kept]]
    active.activate(base, [[second, kept]], {kept})
    assert active.masters[kept] is masters[kept]
    assert base.state[masters[kept]] is state
    assert list(base.state) == [masters[kept]]
    active.activate(base, [[first]], {kept})
    assert active.aside == {kept: masters[kept]}
    assert active.states_aside == {kept: state}
    assert active.masters[first] is not masters[first]
    assert not base.state
    active.activate(base, [[kept]], {kept})
    assert active.masters == {kept: masters[kept]}
    assert base.state[masters[kept]] is state
    active.activate(base, [[kept]], frozenset())
    assert active.masters[kept] is not masters[kept]
    assert not base.state


def test_block_optimizer_is_one_class() -> None:
    """Its life before the first step was a class of its own, with stubs for what that took from the other one."""
    assert BlockOptimizer.__bases__ == (Trained, torch.optim.Optimizer)


def test_block_optimizer_is_asked_for_by_type_in_three_places_at_most() -> None:
    """A plain optimizer was a second species: 42 branches asked for the class."""
    asked = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                kinds = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                if "BlockOptimizer" in kinds:
                    asked.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert len(asked) <= 3, asked
