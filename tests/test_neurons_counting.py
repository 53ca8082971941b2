"""Counts of active neurons: those of an oracle, on our model and on transformers, whatever computes the experts."""

import pytest
import torch
from neuron_models import IMPLEMENTATIONS, ours, theirs, tokens
from sigma_neurons.counting import ActivationCounter, _by_bytes, _by_index, count_segments
from sigma_neurons.sites import Site, find_sites
from sigma_neurons.stats import ActivationStats
from sigma_train.config import Config
from sigma_train.errors import WrongInput
from sigma_train.model import MLP, LanguageModel, precision
from torch import nn

import sigma_kernels as sk

LANGUAGES = ("de", "en", "ja")


@torch.no_grad()
def counted(model, batches, languages=LANGUAGES) -> ActivationStats:
    with ActivationCounter(model, languages) as counter:
        for language, inputs in batches:
            with counter.batch(language, inputs):
                model(inputs)
    return counter.stats


def equal(a: ActivationStats, b: ActivationStats) -> bool:
    pairs = zip((a.tokens, *a.routed, *a.fired), (b.tokens, *b.routed, *b.fired), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_zero_is_not_active():
    gates = torch.tensor([[1.0, -1, 0], [2, 3, -4]])
    assert count_segments(gates > 0, torch.tensor([2])).tolist() == [[2, 1, 0]]
    model = nn.Sequential(MLP(3, 3))
    with torch.no_grad():
        model[0].gate_up_proj.weight.copy_(torch.eye(3).repeat(2, 1))
    with ActivationCounter(model, ["de"]) as counter, counter.batch("de", torch.zeros(2)):
        model(gates)
    stats = counter.stats
    assert stats.fired[0].tolist() == [[[2, 1, 0]]]
    assert stats.fired[0].dtype == torch.int64


def test_a_prompt_can_be_taken_away():
    """Full counts [5, 4] over 10 tokens, of which a prompt has [2, 4] over 4: p = [0.5, 0]."""

    def stats(fired: list[int], rows: int) -> ActivationStats:
        out = ActivationStats.zeros(["de"], [Site("mlp", 0, 1, 2, "gate")])
        out.tokens[0] = out.routed[0][0] = rows
        out.fired[0][0, 0] = torch.tensor(fired)
        return out

    full, prompt = stats([5, 4], 10), stats([2, 4], 4)
    assert full.minus(prompt).joint().tolist() == [[0.5], [0.0]]
    assert equal(full.minus(prompt).merge(prompt), full)
    with pytest.raises(WrongInput, match="must be part of the counts"):
        prompt.minus(full)
    with pytest.raises(WrongInput, match="same languages and layers"):
        full.merge(ActivationStats.zeros(["en"], full.sites))


def test_joint_and_conditional_probability_of_an_expert():
    """Ten tokens, four routed to an expert, three of them fire: joint 0.3, conditional 0.75."""
    stats = ActivationStats.zeros(["de"], [Site("experts", 0, 2, 1, "ours")])
    stats.tokens[0] = 10
    stats.routed[0][0] = torch.tensor([4, 6])
    stats.fired[0][0] = torch.tensor([[3], [0]])
    assert stats.joint().tolist() == [[0.3], [0.0]]
    assert stats.conditional().tolist() == [[0.75], [0.0]]
    assert stats.routing().tolist() == [[0.4], [0.6]]
    assert stats.conditional(least=5).tolist() == [[0.0], [0.0]]


def test_an_expert_that_one_language_hardly_visits_says_nothing():
    """Defends: a neuron that is bound to a language for want of tokens of the others."""
    stats = ActivationStats.zeros(["de", "en"], [Site("experts", 0, 2, 1, "ours")])
    stats.routed[0].copy_(torch.tensor([[9, 9], [1, 9]]))
    stats.fired[0].copy_(torch.tensor([[[9], [3]], [[0], [6]]]))
    assert stats.conditional(least=2).tolist() == [[0, 0], [3 / 9, 6 / 9]]
    assert stats.conditional().tolist() == [[1, 0], [3 / 9, 6 / 9]]


@torch.no_grad()
def oracle(model: LanguageModel, inputs: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
    """fired [K, E, I] of each layer, from the inputs of the layers and a loop over tokens, in f64."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(moe, args, _out):
        seen.append((args[0], moe.last_routing.indices))

    hooks = [moe.register_forward_hook(see) for moe in model.moe_layers()]
    model(inputs)
    for hook in hooks:
        hook.remove()
    out = []
    for moe, (x, indices) in zip(model.moe_layers(), seen, strict=True):
        E, I = moe.experts.down_proj.shape[0], moe.experts.down_proj.shape[2]
        fired = torch.zeros(len(LANGUAGES), E, I, dtype=torch.int64)
        for token, chosen, language in zip(
            x.flatten(0, 1), indices.tolist(), ids.flatten().tolist(), strict=True
        ):
            for e in chosen:
                gate = moe.experts.gate_up_proj[e, :I].double() @ token.double()
                if language >= 0:
                    fired[language, e] += gate > 0
        out.append(fired)
    return out


def test_counts_of_our_experts_are_those_of_a_loop_over_tokens():
    """In a batch of many languages, some tokens of none.  Defends: rows of another order, ups for gates, -1 counted."""
    model, inputs = ours(), tokens()
    ids = torch.randint(-1, 3, inputs.shape, generator=torch.Generator().manual_seed(1))
    stats = counted(model, [(ids, inputs)])
    for fired, want in zip(stats.fired, oracle(model, inputs, ids), strict=True):
        assert torch.equal(fired, want)
    assert stats.tokens.tolist() == [(ids == k).sum().item() for k in range(3)]
    assert [int(routed.sum()) for routed in stats.routed] == [2 * int((ids >= 0).sum())] * 3  # top_k = 2


def test_a_batch_of_one_language_counts_as_the_same_ids_do():
    model = ours()
    batches = [("en", tokens(seed=1)), ("ja", tokens(seed=2))]
    as_ids = [(torch.full((4, 32), LANGUAGES.index(name)), inputs) for name, inputs in batches]
    mixed = (torch.cat([ids for ids, _ in as_ids]), torch.cat([inputs for _, inputs in batches]))
    by_name = counted(model, batches)
    assert equal(by_name, counted(model, as_ids))
    assert equal(by_name, counted(model, [mixed]))
    assert by_name.tokens.tolist() == [0, 128, 128]


def test_two_shards_merged_are_one_pass():
    model = ours()
    batches = [("en", tokens(seed=1)), ("ja", tokens(seed=2)), ("en", tokens(seed=3))]
    parts = counted(model, batches[:1]).merge(counted(model, batches[1:]))
    assert equal(parts, counted(model, batches))


def test_masked_tokens_do_not_count():
    model, inputs = ours(), tokens()
    mask = torch.arange(32).expand(4, 32) >= 5
    with torch.no_grad(), ActivationCounter(model, LANGUAGES) as counter, counter.batch("en", inputs, mask):
        model(inputs)
    ids = torch.where(mask, 1, -1)
    assert equal(counter.stats, counted(model, [(ids, inputs)]))
    assert counter.stats.tokens.tolist() == [0, 4 * 27, 0]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("experts", [6, 1])
def test_the_model_computes_the_same_bits_and_is_left_as_it_was(experts, dtype):
    """Defends: a hook that stays, another kernel while counting, gates of f32 weights where the products are bf16."""
    model, inputs = ours(experts, dtype=dtype), tokens()
    config = Config.from_dict({"train": {"dtype": dtype}})
    before = [dict(module.__dict__) for module in model.modules()]
    with torch.no_grad(), precision(config):
        want = model(inputs)
        with ActivationCounter(model, LANGUAGES) as counter:
            with counter.batch("de", inputs):
                got = model(inputs)
            model(inputs)  # outside of a batch: nobody's
    assert torch.equal(got, want)
    assert counter.stats.tokens.tolist() == [128, 0, 0]
    for module, then in zip(model.modules(), before, strict=True):
        now = {k: v for k, v in module.__dict__.items() if not k.startswith("last_")}
        assert now.keys() == {k for k in then if not k.startswith("last_")}
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_counts_while_gradients_are_kept():
    model, inputs = ours(), tokens()
    with ActivationCounter(model, LANGUAGES) as counter, counter.batch("de", inputs):
        model(inputs).sum().backward()
    assert equal(counter.stats, counted(model, [("de", inputs)]))
    assert model.layers[0].mlp.experts.gate_up_proj.grad.abs().sum() > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_counts_on_transformers_are_those_of_eager(implementation):
    """Seen by hooks on the activation of eager, whose gates they are; first layer dense.

    Defends: rows in the order of another implementation, the routing of another layer, gates of the wrong half.
    """
    inputs = tokens()
    reference = theirs("eager")
    fired = torch.zeros(12, dtype=torch.int64)
    experts = reference.model.layers[1].mlp.experts

    def see(_module, args, _out):
        fired.add_((args[0] > 0).sum(0))

    hook = experts.act_fn.register_forward_hook(see)
    with torch.no_grad():
        want = reference(inputs).logits
    hook.remove()
    model = theirs(implementation)
    stats = counted(model, [("de", inputs)])
    assert [(site.experts, site.units, site.layer) for site in stats.sites] == [(1, 24, 0), (6, 12, 1)]
    assert stats.fired[1][0].sum(0).tolist() == fired.tolist()
    assert equal(stats, counted(reference, [("de", inputs)]))
    with torch.no_grad(), ActivationCounter(model, LANGUAGES) as counter, counter.batch("de", inputs):
        while_counting = model(inputs).logits
    with torch.no_grad():
        assert torch.equal(
            model(inputs).logits, while_counting
        )  # the implementation is the one that was chosen
    assert torch.allclose(while_counting, want, atol=1e-4)


def test_counts_on_a_dense_model_of_transformers():
    model, inputs = theirs(), tokens()
    gates: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda _m, _a, out: gates.append(out))
    stats = counted(model, [("en", inputs)])
    for fired, routed, gate in zip(stats.fired, stats.routed, gates, strict=True):
        assert torch.equal(fired[1, 0], (gate.flatten(0, 1) > 0).sum(0))
        assert routed.tolist() == [[0], [128], [0]]


@pytest.mark.parametrize("count", [_by_bytes, _by_index])
def test_segments_are_summed_one_by_one(count):
    """Of a CPU and of a GPU.  Defends: an empty segment, one of more than 255 rows in bytes."""
    positive = torch.rand(400, 7, generator=torch.Generator().manual_seed(0)) > 0.1
    want = [positive[a:b].sum(0).tolist() for a, b in ((0, 3), (3, 3), (3, 400))]
    assert count(positive, torch.tensor([3, 3, 400])).tolist() == want


def test_what_was_counted_survives_a_file(tmp_path):
    stats = counted(ours(), [("en", tokens())])
    stats.write(tmp_path / "counts.safetensors")
    again = ActivationStats.read(tmp_path / "counts.safetensors")
    assert equal(again, stats)
    assert (again.languages, again.sites) == (stats.languages, stats.sites)
    (tmp_path / "other").write_text("no tensors")
    with pytest.raises(WrongInput, match="is no file of counts"):
        ActivationStats.read(tmp_path / "other")
    with pytest.raises(WrongInput, match="is missing"):
        ActivationStats.read(tmp_path / "nothing")


@pytest.mark.parametrize(
    "language, rows, message",
    [
        ("fr", 4, "language must be one of de, en, ja, found 'fr'"),
        (torch.zeros(4).long(), 4, r"language must be \[4, 32\] of integers .* found \[4\] int64"),
        (torch.zeros(4, 32), 4, r"language must be \[4, 32\] of integers .* found \[4, 32\] float32"),
        (torch.full((4, 32), 3), 4, "language must have indices from -1 to 2"),
        ("de", 2, "computes 64 tokens of a batch of 128"),
    ],
)
def test_a_wrong_batch_is_named(language, rows, message):
    model, inputs = ours(), tokens()
    with ActivationCounter(model, LANGUAGES) as counter:
        with pytest.raises(WrongInput, match=message), counter.batch(language, inputs):
            model(inputs[:rows])
        with counter.batch("de", inputs):  # and the next one counts
            model(inputs)
    assert equal(counter.stats, counted(model, [("de", inputs)]))


@pytest.mark.parametrize("mask", [torch.ones(1, dtype=torch.bool), torch.ones(4, 32)], ids=["shape", "dtype"])
def test_a_wrong_mask_is_named(mask):
    """Defends: one entry taken for all tokens."""
    with (
        ActivationCounter(ours(), LANGUAGES) as counter,
        pytest.raises(WrongInput, match=r"mask must be \[4, 32\] bool on cpu as tokens are, found \["),
        counter.batch("de", tokens(), mask),
    ):
        pass


def test_a_batch_is_one_forward():
    model, inputs = ours(), tokens()
    with ActivationCounter(model, LANGUAGES) as counter:
        batch = counter.batch("de", inputs)
        batch.__enter__()
        model(inputs)
        model(inputs)
        with pytest.raises(
            WrongInput, match="one forward of the model; it has 3 layers of neurons, 6 computed"
        ):
            batch.__exit__(None, None, None)
    assert counter.stats.tokens.tolist() == [0, 0, 0]


def test_wrong_models_and_languages_are_named():
    with pytest.raises(WrongInput, match="languages must be distinct names, found de, de"):
        ActivationCounter(ours(), ["de", "de"])
    with pytest.raises(WrongInput, match="Linear has no gated feed-forward layer"):
        find_sites(nn.Linear(2, 2))


class Spread(sk.nn.MoE):
    pass


def test_layouts_that_would_be_counted_wrongly_are_refused():
    with pytest.raises(WrongInput, match="is a Spread, whose experts may be elsewhere"):
        ActivationCounter(nn.Sequential(Spread(8, 8, 4)), ["de"])
    model = theirs("eager")
    model.model.layers[1].mlp.experts.is_transposed = True
    with pytest.raises(WrongInput, match=r"layers.1.mlp.experts \(Qwen3MoeExperts\) has is_transposed=True"):
        find_sites(model)
    model = theirs("eager")
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj, experts.down_proj = (
        nn.Parameter(p.transpose(1, 2)) for p in (experts.gate_up_proj, experts.down_proj)
    )  # as Llama4TextExperts, of which no flag says so
    with pytest.raises(WrongInput, match=r"gate_up_proj \[6, 16, 24\] beside down_proj \[6, 12, 16\]"):
        find_sites(model)
    model = theirs()
    model.model.layers[0].mlp.act_fn = nn.Tanhshrink()
    find_sites(model)  # odd, but positive just where its input is
    model.model.layers[0].mlp.act_fn = nn.Sigmoid()
    with pytest.raises(WrongInput, match="not positive just where its input is"):
        find_sites(model)
