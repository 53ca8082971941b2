"""Growth of layers and experts: plans, noise, moments, and that the grown model computes what it must."""

import math

import pytest
import torch
from sigma_train.config import load_config
from sigma_train.errors import WrongInput
from sigma_train.growth import grow, grow_depth, grow_experts, grow_optimizer_state
from sigma_train.growth_config import grown_config
from sigma_train.growth_layers import LayerGrowthPlan
from sigma_train.growth_norms import norm_seam, planned_profile, weight_norm_profile
from sigma_train.growth_pieces import Growth
from sigma_train.model import LanguageModel

import sigma_kernels as sk
from sigma_kernels.nn import MoE, load_balancing_loss, router_z_loss

PLAN = LayerGrowthPlan
SMALL = [
    "model.vocab_size=300", "model.hidden_size=16", "model.num_layers=3", "model.head_dim=8",
    "model.intermediate_size=12", "model.num_experts=6", "model.top_k=2",
]  # fmt: skip


def make_model(*settings: str) -> LanguageModel:
    """With weights large enough to tell one from another, norms and biases too."""
    torch.manual_seed(0)
    model = LanguageModel(load_config("smoke", None, [*SMALL, *settings]))
    with torch.no_grad():
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if name not in ("cos", "sin"):
                x.copy_(torch.randn_like(x) * 0.3 + (x.dim() == 1))
    return model


def grown_model(model: LanguageModel, growth: Growth, *settings: str) -> LanguageModel:
    config = grown_config(load_config("smoke", None, [*SMALL, *settings]), growth)
    grown = LanguageModel(config)
    grown.load_state_dict(grow(model.state_dict(), growth))
    return grown


def make_moe(E: int, k: int, **how: object) -> MoE:
    torch.manual_seed(1)
    return MoE(8, 6, E, k, **how, dtype=torch.float64)


def twin_of(moe: MoE, k: int, factor: int = 2, noise: float = 0.0, **how: object) -> MoE:
    """The same layer with `factor` times as many experts, of which k are active."""
    E = moe.router.weight.shape[0]
    state = grow_experts({f"layers.0.mlp.{n}": x for n, x in moe.state_dict().items()}, factor, noise)
    twin = make_moe(factor * E, k, **how)
    twin.load_state_dict({name.removeprefix("layers.0.mlp."): x for name, x in state.items()})
    return twin


@pytest.mark.parametrize(
    "plan, sources",
    [
        (PLAN.interposition(4), [0, 0, 1, 1, 2, 2, 3, 3]),
        (PLAN.stack(4), [0, 1, 2, 3, 0, 1, 2, 3]),
        (PLAN.interposition(6, 2, 2, 2), [0, 1, 2, 2, 3, 3, 4, 5]),
        (PLAN.stack(6, 2, 2, 2), [0, 1, 2, 3, 2, 3, 4, 5]),
        (PLAN.interposition(3, 3, skip_last=1), [0, 0, 0, 1, 1, 1, 2]),
        (PLAN.stack(3, 3, skip_last=1), [0, 1, 0, 1, 0, 1, 2]),
        (PLAN.none(3), [0, 1, 2]),
        (PLAN.stack(3, 1, 1, 1), [0, 1, 2]),
    ],
)
def test_a_plan_is_that_of_the_paper(plan, sources):
    """Defends: a copy of an edge layer, one too few, an order that is the other plan's."""
    assert list(plan.sources) == sources
    assert plan.num_layers == max(sources) + 1
    assert sum(plan.copies) == len(sources) - plan.num_layers
    assert [j for i in range(plan.num_layers) for j in plan.targets(i)] == sorted(
        range(len(sources)), key=lambda j: (sources[j], j)
    )


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: PLAN.interposition(4, 0), "factor must be at least 1, found 0"),
        (lambda: PLAN.stack(0), "n must be at least 1, found 0"),
        (lambda: PLAN.stack(4, 2, -1), "skip_first must be at least 0, found -1"),
        (lambda: PLAN.stack(4, 2, 2, 2), r"must leave one of 4 layers to copy, found 2 \+ 2"),
        (lambda: PLAN((0, 2)), r"sources must name every layer from 0 on, found \[0, 2\]"),
        (lambda: Growth(PLAN.none(1), 0), "experts must be at least 1, found 0"),
        (lambda: Growth(PLAN.none(1), 2, math.nan), "noise must be a number of at least 0, found nan"),
        (lambda: Growth(PLAN.none(1), balance_bias="half"), "must be 'copy' or 'zero', found 'half'"),
        (lambda: grow_depth({"layers.0.x": torch.ones(1)}, PLAN.none(2)), "of 2 layers, the model has 1"),
        (lambda: grow_depth({"x": torch.ones(1)}, PLAN.none(1)), "no tensor is named as one of a layer"),
        (lambda: grow_experts({"layers.0.mlp.down_proj": torch.ones(1)}), "the model has no experts"),
        (
            lambda: grow_experts({"layers.0.mlp.experts.w": torch.ones(1)}),
            "layers.0.mlp.experts.w is no tensor",
        ),
        (
            lambda: grow_optimizer_state({}, Growth(PLAN.none(1)), "keep"),
            "'reset' or 'inherit', found 'keep'",
        ),
        (
            lambda: grow_experts(
                {
                    "layers.0.mlp.router.weight": torch.ones(2, 1),
                    "layers.0.mlp.router.expert_bias": torch.ones(3),
                }
            ),
            "tensors of layer 0 disagree in the number of experts",
        ),
        (
            lambda: grow_experts(
                {
                    "layers.0.mlp.experts.gate_up_proj": torch.ones(2, 4, 1),
                    "layers.0.mlp.experts.down_proj": torch.ones(3, 1, 2),
                }
            ),
            "layers.0.mlp.experts.down_proj is of 3 experts, one beside it of 2",
        ),
        (
            lambda: grow_experts({"layers.0.mlp.experts.down_proj": torch.full((2, 1, 1), math.nan)}),
            "layers.0.mlp.experts.down_proj with noise 0.01 has numbers that are not finite",
        ),
        (
            lambda: grow_experts({"layers.0.mlp.experts.down_proj": torch.randn(2, 3, 4).half()}, noise=1e6),
            r"layers.0.mlp.experts.down_proj with noise 1e\+06 has numbers that are not finite",
        ),
        (
            lambda: grow_depth({"layers.0.mlp.down_proj.weight": torch.ones(1, 1)}, PLAN.stack(1), True),
            "not found in layer 1",
        ),
    ],
)
def test_what_cannot_grow_is_named(make, told):
    with pytest.raises(WrongInput, match=told):
        make()


def test_gates_of_twins_are_half_each():
    """Defends: the premise of exactness, k = 1 of [2, 1, 0, -1] against k = 2 of the same logits twice."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    twice = torch.cat([logits, logits], 1)
    assert sk.route(logits, 1).weights.item() == pytest.approx(0.6439142599, abs=1e-10)
    routing = sk.route(twice, 2)
    assert sorted(routing.indices[0].tolist()) == [0, 4]
    assert routing.weights[0].tolist() == pytest.approx([0.3219571299] * 2, abs=1e-10)
    assert sk.route(twice, 2, normalize=True).weights[0].tolist() == [0.5, 0.5]


HOW = {
    "softmax": {},
    "softmax, normalised": {"normalize": True},
    "sigmoid, normalised": {"score": "sigmoid", "normalize": True},
}


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_more_experts_compute_the_same(how, factor):
    """Defends: k that stays as it was, copies in the wrong rows; f64, without noise."""
    x = torch.randn(40, 8, dtype=torch.float64)
    moe = make_moe(6, 2, **how)
    assert (twin_of(moe, 2 * factor, factor, **how)(x) - moe(x)).abs().max() < 1e-12
    assert (twin_of(moe, 2, factor, **how)(x) - moe(x)).abs().max() > 1e-3


def test_sigmoids_that_are_not_normalised_double():
    """Defends: the one router that growth of the configuration has to divide."""
    x = torch.randn(40, 8, dtype=torch.float64)
    moe = make_moe(6, 2, score="sigmoid")
    assert (twin_of(moe, 4, score="sigmoid")(x) - 2 * moe(x)).abs().max() < 1e-12
    config = load_config("smoke", None, [*SMALL, "router.score=sigmoid", "router.output_scale=3.0"])
    assert grown_config(config, Growth(PLAN.none(3), 2)).router.output_scale == 1.5


def test_balance_loss_stays_and_z_loss_jumps():
    """Defends: f by the choices made: divided by k the loss stays 1.15, else it would be 2.30; z-loss grows by ln 2."""
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]], dtype=torch.float64)
    twice = torch.cat([p, p], 1) / 2
    for logits, k in ((p.log(), 1), (twice.log(), 2)):
        counts = sk.route(logits, k).counts
        assert load_balancing_loss(logits, counts).item() == pytest.approx(1.15, abs=1e-12)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    assert router_z_loss(logits).item() == pytest.approx(5.9545257650, abs=1e-9)
    assert router_z_loss(torch.cat([logits, logits], 1)).item() == pytest.approx(9.8177999981, abs=1e-9)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_bias_of_selection_chooses_as_before(score):
    """Defends: a bias that outweighs probabilities which have become half as large; noise on a bias."""
    settings = (f"router.score={score}", "router.balance=bias")
    model = make_model(*settings)
    tokens = torch.randint(0, 300, (2, 20))
    grown = grown_model(model, Growth(PLAN.none(3), 2, 0.0, score=score), *settings)
    assert (grown(tokens) - model(tokens)).abs().max() < 1e-5 * model(tokens).abs().max()
    state = {"layers.0.mlp.router.expert_bias": torch.tensor([0.5, 1.0])}
    want = {"softmax": [0.25, 0.5, 0.25, 0.5], "sigmoid": [0.5, 1.0, 0.5, 1.0]}[score]
    assert grow_experts(state, 2, 0.5, score=score)["layers.0.mlp.router.expert_bias"].tolist() == want
    zero = grow_experts(state, 2, 0.5, score=score, balance_bias="zero")
    assert zero["layers.0.mlp.router.expert_bias"].tolist() == [*want[:2], 0.0, 0.0]


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_twins_part_by_noise_alone(noise):
    """Defends: noise that never reaches a copy; without it 20 steps of Adam leave twins the same."""
    twin = twin_of(make_moe(4, 1), 2, noise=noise)
    begin = apart(twin)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2)
    x, y = torch.randn(64, 8, dtype=torch.float64), torch.randn(64, 8, dtype=torch.float64)
    for _ in range(20):
        optimizer.zero_grad()
        (twin(x) - y).square().mean().backward()
        optimizer.step()
    if noise:
        assert apart(twin) > begin > 0
    else:
        assert begin == 0
        assert apart(twin) <= 1e-7


def apart(twin: MoE) -> float:
    old, new = twin.experts.down_proj.chunk(2)
    return (old - new).abs().max().item()


@pytest.mark.parametrize("how", [{}, {"normalize": True}], ids=str)
def test_twins_have_half_of_the_gradient(how):
    """Defends: the factor by which moments are inherited."""
    x = torch.randn(40, 8, dtype=torch.float64)
    moe = make_moe(6, 2, **how)
    twin = twin_of(moe, 4, **how)
    for layer in (moe, twin):
        (layer(x).sin()).sum().backward()
    for name, p in moe.named_parameters():
        grad = twin.get_parameter(name).grad
        for half in grad.chunk(2):
            assert (half - p.grad / 2).abs().max() < 1e-12, name


@pytest.mark.parametrize("plan", [PLAN.interposition(3), PLAN.stack(3, 2, 1, 0)], ids=str)
def test_copied_layers_that_add_nothing_change_nothing(plan):
    """Defends: an output that is not zero; and that without zeros the model is another, as is documented."""
    model, tokens = make_model(), torch.randint(0, 300, (2, 20))
    same = grown_model(model, Growth(plan, zero_outputs=True))
    assert len(same.layers) == len(plan.sources)
    assert torch.equal(same(tokens), model(tokens))
    other = grown_model(model, Growth(plan))
    assert (other(tokens) - model(tokens)).abs().max() > 1e-3


def test_no_two_layers_share_memory():
    """Defends: copies that are views, of which training would move both."""
    state = make_model().state_dict()
    for grown in (grow_depth(state, PLAN.stack(3)), grow_experts(state), grow_depth(state, PLAN.none(3))):
        places = [x.untyped_storage().data_ptr() for x in (*grown.values(), *state.values())]
        assert len(set(places)) == len(places) - 1  # embedding and head of `state` are tied
    before = {name: x.clone() for name, x in state.items()}
    for x in grow_depth(state, PLAN.interposition(3)).values():
        x.zero_()
    assert all(torch.equal(x, before[name]) for name, x in state.items())


def test_parameters_grow_by_experts_and_router_alone():
    """Defends: other tensors that grow in width; other active parameters than k experts and E rows more."""
    model = make_model()
    grown = grown_model(model, Growth(PLAN.none(3), 2))
    of_experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n or ".router." in n)
    count = [sum(p.numel() for p in m.parameters()) for m in (model, grown)]
    assert count[1] - count[0] == of_experts
    expert, router = 3 * 16 * 12, 6 * 16
    assert grown.active_parameters() - model.active_parameters() == 3 * (2 * expert + router)


def test_depth_and_width_commute():
    state, plan = make_model("router.balance=bias").state_dict(), PLAN.interposition(3, 2, 1)
    one = grow_experts(grow_depth(state, plan), noise=0.0)
    other = grow_depth(grow_experts(state, noise=0.0), plan)
    both = grow(state, Growth(plan, 2, 0.0))
    assert one.keys() == other.keys() == both.keys()
    assert all(torch.equal(one[name], other[name]) and torch.equal(one[name], both[name]) for name in one)


def test_inherited_moments_make_the_step_that_would_have_been_made():
    """Defends: m and v of another size than the gradients of grown experts and router rows, a lost count of steps."""
    growth = Growth(PLAN.none(1), 2, 0.0)
    moe, prefix = make_moe(6, 2), "layers.0.mlp."
    optimizer = adamw(moe)
    for _ in range(3):
        step(moe, optimizer)
    twin = twin_of(moe, 4)
    theirs = adamw(twin)
    grown = grow_optimizer_state(moments_of(moe, optimizer, prefix), growth, "inherit")
    for name, p in twin.named_parameters():
        slots = ("step", "exp_avg", "exp_avg_sq")
        theirs.state[p] = {slot: grown[f"state.{prefix}{name}.{slot}"] for slot in slots}
    step(moe, optimizer)
    step(twin, theirs)
    for name, p in moe.named_parameters():
        for half in twin.get_parameter(name).chunk(2):
            assert (half - p).abs().max() < 1e-12, name
    assert grow_optimizer_state(moments_of(moe, optimizer, prefix), growth, "reset") == {}


def test_moments_of_copied_layers_are_those_of_their_origin():
    """Defends: noise on moments, or zeros in those of outputs that begin at zero."""
    model = make_model()
    optimizer = adamw(model)
    model(torch.randint(0, 300, (1, 20))).square().mean().backward()
    optimizer.step()
    state = moments_of(model, optimizer)
    grown = grow_optimizer_state(state, Growth(PLAN.stack(3), 2, 0.5, zero_outputs=True), "inherit")
    assert len(grown) - len(state) == sum(name.startswith("state.layers.") for name in state)
    for name, share in (
        ("self_attn.o_proj.weight.exp_avg", 1.0),
        ("mlp.experts.down_proj.step", 1.0),
        ("mlp.experts.down_proj.exp_avg", 0.5),
        ("mlp.router.weight.exp_avg_sq", 0.25),
    ):
        want = share * state[f"state.layers.1.{name}"]
        got = grown[f"state.layers.4.{name}"]
        assert torch.equal(got, want if share == 1 else torch.cat([want, want])), name


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-30)


def step(moe: MoE, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    moe(torch.linspace(-1, 1, 320, dtype=torch.float64).view(40, 8).sin()).sin().sum().backward()
    optimizer.step()


def moments_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, prefix: str = ""
) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {f"state.{prefix}{name}.{slot}": x for name, p in named for slot, x in optimizer.state[p].items()}


def test_the_seam_of_a_stack():
    """Defends: a norm over vectors or of one tensor alone, a seam found elsewhere."""
    tensors = [(f"layers.{i}.w", torch.full((2, 3), -(i + 1.0))) for i in range(4)]
    tensors += [("layers.0.norm", torch.full((3,), 99.0)), ("lm_head.weight", torch.ones(2, 2))]
    profile = weight_norm_profile(tensors)
    assert profile.tolist() == [1.0, 2.0, 3.0, 4.0]
    stack = norm_seam(planned_profile(profile, PLAN.stack(4)))
    assert stack == (3, 3.0, 3.0)
    woven = norm_seam(planned_profile(profile, PLAN.interposition(4)))
    assert (woven.fall, woven.ratio) == (0.0, 0.0)
    mixed = weight_norm_profile([("layers.0.a", torch.ones(2, 2)), ("layers.0.b", 7 * torch.ones(2, 2))])
    assert mixed.tolist() == [5.0]
    assert norm_seam(torch.tensor([1.0, 2.0])) == (0, -1.0, 0.0)


def test_settings_grow_with_the_weights():
    """Defends: a list of layers in the old order, k that stays, normalisation of gates that were none."""
    plan = PLAN.interposition(3, 2, 1)
    config = load_config(
        "smoke",
        None,
        [*SMALL, "model.top_k=[1,2,3]", "sparsity.phases=[[0,[3,3,3]],[0.5,[1,2,3],0.75]]"],
    )
    grown = grown_config(config, Growth(plan, 2))
    assert (grown.model.num_layers, grown.model.num_experts) == (5, 12)
    assert grown.model.top_k == (2, 4, 4, 6, 6)
    assert [phase[1] for phase in grown.sparsity.phases] == [(6,) * 5, (2, 4, 4, 6, 6)]
    assert grown.sparsity.phases[1][2] == 0.75
    config = load_config("smoke", None, [*SMALL, "sparsity.sample=[1,2]"])
    assert grown_config(config, Growth(PLAN.none(3), 3)).sparsity.sample == (3, 6)
    drawn = load_config("smoke", None, [*SMALL, "sparsity.sample=[1,2]", "sparsity.budget=5"])
    assert grown_config(drawn, Growth(plan, 3)).sparsity.budget == 5 * 3 * 5 // 3
    deeper = grown_config(config, Growth(plan))
    assert (deeper.model.top_k, deeper.model.num_experts, deeper.sparsity.sample) == (2, 6, (1, 2))
    dense = load_config("smoke", None, [*SMALL, "model.num_experts=1"])
    with pytest.raises(WrongInput, match="a dense model has no experts to grow"):
        grown_config(dense, Growth(PLAN.none(3), 2))


@pytest.mark.filterwarnings("ignore::sigma_train.config.ConfigWarning")
def test_one_expert_alone_keeps_its_gate():
    """Defends: `normalize`, which the model leaves out at k = 1 and would apply at k = 2."""
    settings = ("router.normalize=true", "model.top_k=1")
    model, tokens = make_model(*settings), torch.randint(0, 300, (2, 20))
    grown = grown_model(model, Growth(PLAN.none(3), 2, 0.0), *settings)
    assert (grown(tokens) - model(tokens)).abs().max() < 1e-5 * model(tokens).abs().max()
    mixed = load_config("smoke", None, [*SMALL, "router.normalize=true", "model.top_k=[1,2,2]"])
    with pytest.raises(WrongInput, match=r"found \[1, 2\] experts a token"):
        grown_config(mixed, Growth(PLAN.none(3), 2))


@pytest.mark.parametrize("top_k", ["model.top_k=1", "model.top_k=[1,2,2]"])
def test_one_expert_whose_gate_is_one_shares_it(top_k):
    """Defends: `normalize_one`, with which a layer of one expert is like any other: copies have 1/f, not p/f."""
    settings = ("router.normalize=true", "router.normalize_one=true", top_k)
    model, tokens = make_model(*settings), torch.randint(0, 300, (2, 20))
    grown = grown_model(model, Growth(PLAN.none(3), 3, 0.0), *settings)
    assert (grown(tokens) - model(tokens)).abs().max() < 1e-5 * model(tokens).abs().max()
