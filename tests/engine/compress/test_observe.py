"""What a layer's matrices are fed with is gathered stage by stage, in the quantized model and in the original one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from flat_batches import all_logits
from torch import Tensor

from engine.checkpoint.loader import ShardedWeights
from engine.compress.gram import Gram, blended, total
from engine.compress.hessian import DAMPING
from engine.compress.layer import LayerWeights, SequenceRunner
from engine.compress.modules import Matrix, layer_matrices
from engine.compress.observe import ObserveOptions, Observer, stages
from engine.config import EngineConfig, ModelConfig
from engine.execution.executor import Executor
from engine.execution.parallel import TensorParallelGroup
from engine.models import model_builder

LENGTH = 23
VARIANTS = ["dense-tied", "dense-wide-heads-old-rope", "moe-no-shared", "moe-two-shared-old-rope", "moe-no-bias",
            "moe-every-other-layer", "qwen2-tied", "qwen2-wide-heads-old-rope"]  # fmt: skip
FP32 = {"dtype": torch.float32, "device": torch.device("cpu")}
ALIKE = ObserveOptions(per_expert_inputs=False, weight_by_routing=False, match_original=False)


class Walk:
    """A model whose layers run one by one, each observed before."""

    def __init__(self, folder: Path) -> None:
        self.config = ModelConfig.from_folder(folder)
        self.weights = ShardedWeights(folder, self.config, rank=0, world_size=1, **FP32)
        self.runner = SequenceRunner(self.config, length=LENGTH, **FP32)
        self.layers = [LayerWeights(self.weights, self.config, i) for i in range(self.config.num_hidden_layers)]

    def observe(self, layer: int, states: Tensor, options: ObserveOptions, original: Tensor | None = None) -> Sums:
        """Sums of every matrix of a layer, its weights as they are; states [batches][sequences, LENGTH, H]."""
        weights = self.layers[layer]
        built = self.runner.build(weights, layer)
        sums = Sums()
        for stage, matrices in stages(layer_matrices(self.config, layer)):
            observer = Observer(stage, built, weights, None if original is None else (built, weights), options)
            for i in range(len(states)):  # batches add up
                cache, inputs = self.runner.inputs(1)
                other = None if original is None else original[i]
                observer.add(states[i], other, cache, inputs)
            for matrix in matrices:
                sums.grams[matrix.module] = observer.gram(matrix)
                sums.keys[matrix.module] = observer.key(matrix)
        return sums

    def advance(self, layer: int, states: Tensor) -> Tensor:
        return self.runner.run(self.runner.build(self.layers[layer], layer), states)


class Sums:
    def __init__(self) -> None:
        self.grams: dict[str, Gram] = {}
        self.keys: dict[str, str] = {}

    def __getitem__(self, matrix: Matrix) -> Gram:
        return self.grams[matrix.module]


def prompts(config: ModelConfig, count: int = 3) -> Tensor:
    return torch.randint(0, config.vocab_size, (count, LENGTH), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("name", VARIANTS)
def test_layers_one_by_one_compute_what_the_engine_computes(random_checkpoint, name):
    folder, _ = random_checkpoint(name)
    walk = Walk(folder)
    tokens = prompts(walk.config)
    states = walk.weights.embedding()[tokens]
    for layer in range(walk.config.num_hidden_layers):
        states = walk.advance(layer, states)
    decoder = model_builder(walk.config, walk.weights, TensorParallelGroup(0, 1), **FP32).build()
    with torch.inference_mode():
        found = decoder.head(decoder.norm(states.flatten(0, 1))).view(*tokens.shape, -1)
    config = EngineConfig(model=str(folder), device="cpu", max_model_len=64, max_num_seqs=4, num_threads=1)
    executor = Executor.start_local(config, walk.config)
    expected = torch.stack([all_logits(executor, row) for row in tokens.tolist()])
    executor.shutdown()
    assert expected.abs().max() > 0.5, "logits near zero compare nothing"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["dense-tied", "moe-no-shared", "moe-two-shared-old-rope", "qwen2-tied"])
def test_h_is_the_product_of_the_inputs_that_transformers_sees(random_checkpoint, name):
    folder, peer = random_checkpoint(name)
    walk = Walk(folder)
    tokens = prompts(walk.config)
    states = walk.weights.embedding()[tokens]
    inputs = peer_inputs(peer, walk, tokens)
    for layer in range(walk.config.num_hidden_layers):
        sums = walk.observe(layer, states, ALIKE)
        for matrix in layer_matrices(walk.config, layer):
            x, gram = inputs[layer, matrix.inputs].double(), sums[matrix]
            assert gram.tokens == len(x)
            assert gram.cross is None
            if len(x):
                torch.testing.assert_close(gram.matrix.double(), x.T @ x, atol=2e-3, rtol=1e-4)
        states = walk.advance(layer, states)


def peer_inputs(peer, model: Walk, tokens: Tensor) -> dict[tuple[int, str], Tensor]:
    """Inputs of every matrix in transformers' model; those of experts' second projections by hand from the first's."""
    seen: dict[tuple[int, str], Tensor] = {}

    def watch(module, key):
        return module.register_forward_pre_hook(lambda _, args: seen.__setitem__(key, args[0].flatten(0, -2)))

    names = {
        "self_attn.q_proj": "self_attn.qkv_proj",
        "self_attn.o_proj": "self_attn.o_proj",
        "mlp": "mlp",
        "mlp.down_proj": "mlp.down_proj",
        "mlp.shared_experts.down_proj": "mlp.shared_experts.down_proj",
    }
    handles = []
    for i, layer in enumerate(peer.model.layers):
        modules = dict(layer.named_modules())
        for theirs, ours in names.items():
            if theirs in modules:
                handles.append(watch(modules[theirs], (i, ours)))
    with torch.no_grad():
        peer(tokens)
    for handle in handles:
        handle.remove()
    moe = model.config.moe
    for i, weights in enumerate(model.layers):
        if moe is None or not model.config.is_moe_layer(i):
            continue
        x, (gate, bias) = seen[i, "mlp"], weights.router(i)
        probabilities = F.linear(x, gate).softmax(dim=-1)
        chosen = (probabilities + (0 if bias is None else bias)).topk(moe.num_experts_per_token).indices
        for expert, gate_up in enumerate(weights.experts()[0]):
            first, second = F.linear(x[(chosen == expert).any(dim=-1)], gate_up).chunk(2, dim=-1)
            seen[i, f"mlp.experts.{expert}.down_proj"] = F.silu(first) * second
    return seen


def test_tokens_count_by_the_square_of_their_routing_weight(random_checkpoint):
    """As their errors do: an output is scaled by the weight, a squared error by its square."""
    folder, _ = random_checkpoint("moe-no-shared")
    walk = Walk(folder)
    states = walk.weights.embedding()[prompts(walk.config)]
    layer, weights = 0, walk.layers[0]
    built = walk.runner.build(weights, layer)
    cache, inputs = walk.runner.inputs(len(states))
    flat = states.flatten(0, 1)
    normed = built.post_attention_norm(flat + built.attention(built.input_norm(flat), cache, inputs))
    gate, bias = weights.router(layer)
    odds = F.linear(normed, gate).softmax(dim=-1)
    chosen = (odds + (0 if bias is None else bias)).topk(walk.config.moe.num_experts_per_token).indices
    shares = torch.zeros_like(odds).scatter(1, chosen, odds.gather(1, chosen))
    shares = shares / shares.sum(dim=1, keepdim=True)  # [T, E]
    sums = walk.observe(layer, states, ObserveOptions(match_original=False))
    for matrix in layer_matrices(walk.config, layer):
        if matrix.inputs != "mlp":
            continue
        mine = normed * shares[:, matrix.expert, None]
        if sums[matrix].matrix is None:
            assert not mine.any()
        else:
            torch.testing.assert_close(sums[matrix].matrix, mine.T @ mine, atol=1e-4, rtol=1e-4)
        assert sums.keys[matrix.module] == f"mlp.experts.{matrix.expert}"


def test_an_expert_without_tokens_takes_the_others_statistics():
    one, two, none = Gram(), Gram(), Gram()
    x, y = torch.randn(50, 8), torch.randn(3, 8)
    one.add(x, 2 * x)
    two.add(y, 3 * y)
    both = total([one, two, none])
    torch.testing.assert_close(both.matrix, x.T @ x + y.T @ y)
    torch.testing.assert_close(both.cross, 2 * x.T @ x + 3 * y.T @ y)
    assert both.tokens == 53
    assert blended(none, both, needed=8) is both
    assert blended(one, both, needed=8) is one
    leaning = blended(two, both, needed=6)
    own, common = two.matrix.trace(), both.matrix.trace()
    expected = (two.matrix / own + both.matrix / common) / 2
    torch.testing.assert_close(leaning.matrix / leaning.matrix.trace(), expected, rtol=1e-4, atol=1e-6)
    drift = (two.cross / own + both.cross / common) / 2
    torch.testing.assert_close(leaning.cross / leaning.matrix.trace(), drift, rtol=1e-4, atol=1e-6)
    assert total([Gram()]).matrix is None


def test_the_target_is_the_best_linear_map_from_what_comes_to_what_should_go(random_checkpoint):
    """Least squares with the damping of the metric, which draws it to the weights themselves."""
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(400, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    drifted = original + 0.5 * torch.randn(400, 16, generator=generator)
    weight = torch.randn(24, 16, generator=generator)
    gram = Gram()
    gram.add(drifted[:150], original[:150])
    gram.add(drifted[150:], original[150:])
    x, y = drifted.double(), original.double()
    h = x.T @ x
    damping = DAMPING * h.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    expected = weight.double() @ (y.T @ x + damping) @ torch.linalg.inv(h + damping)
    torch.testing.assert_close(gram.target(weight).double(), expected, atol=1e-4, rtol=1e-4)

    def off(q: Tensor) -> float:
        return float((original @ weight.T - drifted @ q.T).square().sum())

    assert off(gram.target(weight)) < 0.9 * off(weight)


def test_the_target_makes_up_for_what_the_stream_lacks():
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(400, 16, generator=generator)
    drifted = original + 0.3 * torch.randn(400, 16, generator=generator)
    lacking = drifted @ torch.randn(16, 24, generator=generator) + 0.1 * torch.randn(400, 24, generator=generator)
    weight = torch.randn(24, 16, generator=generator)
    weights = torch.rand(400, generator=generator)
    gram, without = Gram(), Gram()
    gram.add(drifted, original, weights, lacking)
    without.add(drifted, original, weights)
    scale = weights.double().sqrt()[:, None]
    x, wanted = drifted.double() * scale, (original @ weight.T + lacking).double() * scale
    h = x.T @ x
    damping = DAMPING * h.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    expected = (wanted.T @ x + weight.double() @ damping) @ torch.linalg.inv(h + damping)
    torch.testing.assert_close(gram.target(weight).double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gram.matrix, without.matrix)

    def off(q: Tensor) -> float:
        return float((wanted - x @ q.T.double()).square().sum())

    assert off(gram.target(weight)) < 0.2 * off(without.target(weight))


@pytest.mark.parametrize("absorb", [False, True])
def test_experts_together_add_what_the_stream_lacks(random_checkpoint, absorb):
    """Routing weights of a token add up to 1, so its experts get d each; and those that read the stream get none."""
    folder, _ = random_checkpoint("moe-no-shared")
    walk = Walk(folder)
    states = walk.weights.embedding()[prompts(walk.config)]
    sums = walk.observe(0, states, ObserveOptions(absorb_drift=absorb), original=states + 1)
    for matrix in layer_matrices(walk.config, 0):
        writes = matrix.name.endswith(("o_proj", "down_proj"))
        assert (sums[matrix].lacking is not None) == (absorb and writes and sums[matrix].tokens > 0)


def test_without_the_original_inputs_the_target_is_the_weight():
    gram = Gram()
    gram.add(torch.randn(5, 8))
    weight = torch.randn(3, 8)
    assert torch.equal(gram.target(weight), weight)
    assert torch.equal(Gram().target(weight), weight)


@pytest.mark.parametrize("name", ["moe-two-shared-old-rope", "dense-tied"])
def test_both_models_are_seen_token_by_token(random_checkpoint, name):
    """With equal streams every cross sum is H; with another original stream it is not, and H stays."""
    folder, _ = random_checkpoint(name)
    walk = Walk(folder)
    layer = walk.config.num_hidden_layers - 1
    states = walk.weights.embedding()[prompts(walk.config)]
    other = states + 0.1 * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    equal = walk.observe(layer, states, ObserveOptions(), original=states)
    drifted = walk.observe(layer, states, ObserveOptions(), original=other)
    for matrix in layer_matrices(walk.config, layer):
        if equal[matrix].matrix is None:
            continue
        torch.testing.assert_close(equal[matrix].cross, equal[matrix].matrix)
        torch.testing.assert_close(drifted[matrix].matrix, equal[matrix].matrix)
        assert not torch.allclose(drifted[matrix].cross, drifted[matrix].matrix, rtol=1e-3)
