"""Plans: which rule decides, and what every refusal says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from quantine.core.spec import RARE, QuantSpec
from quantine.errors import PlanError
from quantine.families.layers import Layer
from quantine.methods import METHODS
from quantine.methods.adadim import AdaDim
from quantine.methods.gptq import GPTQ
from quantine.methods.rtn import RTN
from quantine.methods.spqr import SpQR
from quantine.plan.decision import Decision
from quantine.plan.plan import Plan
from quantine.plan.presets import BEST, PRESETS
from quantine.plan.rules import Rule
from quantine.plan.scheme import SWEEPS, Scheme
from quantine.plan.scheme_parsing import scheme_from
from samples import FAITHFUL, FAITHFUL_SPEC, quick

LAYERS = [
    Layer("model.embed_tokens", 300, 48, "embedding"),
    Layer("model.layers.0.self_attn.q_proj", 48, 48, "block", 0, 0),
    Layer("model.layers.0.mlp.down_proj", 48, 80, "block", 0, 1),
    Layer("model.layers.1.self_attn.q_proj", 48, 48, "block", 1, 0),
    Layer("model.layers.1.mlp.down_proj", 48, 80, "block", 1, 1),
    Layer("lm_head", 300, 48, "head"),
]
NAMES = [layer.name for layer in LAYERS]


def plan_of(*rules: dict[str, Any]) -> Plan:
    return Plan.from_dict({"rules": list(rules)})


def decided(plan: Plan) -> dict[str, Decision]:
    return {decision.layer.name: decision for decision in plan.resolve(LAYERS)}


def refusal(*rules: dict[str, Any]) -> str:
    with pytest.raises(PlanError) as refused:
        plan_of(*rules).resolve(LAYERS)
    return str(refused.value)


RTN4 = {"method": "rtn", "bits": 4, "group_size": 16}
RTN8 = {"method": "rtn", "bits": 8, "group_size": -1}


class TestMatching:
    def test_a_preset_speaks_of_every_matrix_in_the_blocks(self) -> None:
        found = decided(Plan.preset("gptq", bits=3, group_size=16))
        expected = Scheme(GPTQ(), QuantSpec(3, 16))
        schemes = {name: decision.scheme for name, decision in found.items()}
        assert schemes == {name: expected if ".layers." in name else None for name in NAMES}
        assert list(found) == NAMES
        assert found["lm_head"].reason == "no rule matches"
        assert found[NAMES[1]].reason == "rule 1: @blocks"

    def test_the_first_rule_that_matches_decides(self) -> None:
        found = decided(
            plan_of(
                {"match": "*.1.*.q_proj", "method": "keep"},
                {"match": "*.q_proj", **RTN8},
                {"match": "@blocks", **RTN4},
            )
        )
        bits = {name: d.scheme and d.scheme.spec.bits for name, d in found.items()}
        assert bits == dict(zip(NAMES, [None, 8, 4, None, 4, None], strict=True))
        assert found["model.layers.1.self_attn.q_proj"].reason == "rule 1: *.1.*.q_proj"
        assert found["model.layers.0.self_attn.q_proj"].reason == "rule 2: *.q_proj"

    @pytest.mark.parametrize(
        ("match", "indices"),
        [
            ("@blocks", [1, 2, 3, 4]),
            ("@head", [5]),
            ("@embedding", [0]),
            ("*", [0, 1, 2, 3, 4, 5]),
            ("lm_head", [5]),
            ("model.layers.[1].*", [3, 4]),
            ("model.layers.?.mlp.*", [2, 4]),
            ("*down_proj", [2, 4]),
        ],
    )
    def test_patterns_and_sets(self, match: str, indices: list[int]) -> None:
        found = decided(plan_of({"match": match, **RTN4}))
        assert [i for i, d in enumerate(found.values()) if d.scheme is not None] == indices

    def test_a_head_of_its_own_bits_goes_before_every_rule(self) -> None:
        kept = plan_of({"match": "lm_head", "method": "keep"}, {"match": "@blocks", **RTN4})
        plan = kept.with_head(6)
        found = decided(plan)
        bits = [d.scheme and (d.scheme.spec.bits, d.scheme.spec.group_size) for d in found.values()]
        assert bits == [(6, -1), (4, 16), (4, 16), (4, 16), (4, 16), (6, -1)]
        assert plan.name == f"{kept.name}-head6"
        assert Plan.from_dict(plan.as_dict()) == plan

    def test_patterns_are_case_sensitive_and_match_whole_names(self) -> None:
        for match in ("LM_HEAD", "q_proj", "model.layers"):
            assert f"rule 1 ({match!r})" in refusal({"match": match, **RTN4})

    def test_an_explicit_keep_has_its_reason(self) -> None:
        found = decided(plan_of({"match": "lm_head", "method": "keep"}, {"match": "*", **RTN8}))
        assert found["lm_head"] == Decision(LAYERS[5], None, "rule 1: lm_head", 1)


class TestRefusals:
    def test_a_rule_that_matches_nothing(self) -> None:
        message = refusal({"match": "@blocks", **RTN4}, {"match": "*.gate_proj", **RTN4})
        assert "rule 2 ('*.gate_proj') of plan 'plan' matches no layer" in message
        assert "called like 'model.layers.1.self_attn.q_proj'" in message

    def test_an_unknown_set(self) -> None:
        message = refusal({"match": "@mlp", **RTN4})
        assert message == "unknown set '@mlp' (known: @blocks, @embedding, @head)"

    @pytest.mark.parametrize("match", ["@head", "@embedding", "*"])
    def test_methods_with_inputs_outside_of_blocks(self, match: str) -> None:
        message = refusal({"match": match, "method": "gptq", "group_size": 16})
        layer = "lm_head (head)" if match == "@head" else "model.embed_tokens (embedding)"
        assert message.startswith(f"{layer} can be quantized only by methods that need no inputs")
        assert "not by gptq: use method rtn" in message
        assert message.endswith(f"(rule 1: {match})")

    def test_group_sizes_that_do_not_divide(self) -> None:
        message = refusal({"match": "@blocks", "method": "rtn", "group_size": 32})
        lines = message.splitlines()
        assert len(lines) == 3  # one per number of inputs
        assert (
            "group size 32 does not divide 48 inputs of model.layers.0.self_attn.q_proj, model"
            in (lines[1])
        )
        assert "nearest sizes that do: 16, 24, 48, or -1 for all of them" in lines[1]
        assert "group size 32 does not divide 80 inputs of model.layers.0.mlp.down_proj" in lines[2]
        assert "nearest sizes that do: 16, 20, 40, or -1" in lines[2]

    def test_long_lists_of_layers_are_cut(self) -> None:
        layers = [Layer(f"layers.{n}.fc", 8, 10, "block", n, 0) for n in range(7)]
        with pytest.raises(PlanError, match=r"layers\.3\.fc and 3 more; nearest"):
            Plan.preset("rtn", group_size=4).resolve(layers)

    def test_everything_kept(self) -> None:
        message = refusal({"match": "*", "method": "keep"}, {"match": "@head", **RTN4})
        assert message == "plan 'plan' leaves every layer in 16 bit"

    def test_no_rule_with_a_method(self) -> None:
        for rules in ([], [{"match": "*", "method": "keep"}]):
            with pytest.raises(PlanError, match="plan 'p' quantizes nothing"):
                Plan.from_dict({"rules": rules}, "p")

    @pytest.mark.parametrize(
        ("rule", "expected"),
        [
            ({}, "method must be one of rtn, gptq, spqr, keep, not None"),
            ({"method": "awq"}, "method must be one of rtn, gptq, spqr, keep, not 'awq'"),
            ({"method": ["rtn"]}, "method must be one of rtn, gptq, spqr, keep, not ['rtn']"),
            ({"method": {"rtn": 1}}, "method must be one of rtn, gptq, spqr, keep, not {'rtn': 1}"),
            ({"method": "keep", "bits": 4}, "method 'keep' takes no parameters"),
            ({"method": "keep", "format": "dense"}, "method 'keep' takes no parameters"),
            ({"method": "rtn", "damp": 0.1}, "rtn has no parameter 'damp' (it has bits, "),
            ({"method": "gptq", 3: 4}, "gptq has no parameter 3 (it has bits, "),
            ({"method": "rtn", "bits": 4.0}, "bits must be int, not 4.0"),
            ({"method": "rtn", "bits": "4"}, "bits must be int, not '4'"),
            ({"method": "rtn", "bits": True}, "bits must be int, not True"),
            ({"method": "rtn", "bits": None}, "bits must be int, not None"),
            ({"method": "rtn", "sym": 1}, "sym must be bool, not 1"),
            ({"method": "rtn", "sym": "yes"}, "sym must be bool, not 'yes'"),
            ({"method": "gptq", "damp": "much"}, "damp must be float, not 'much'"),
            ({"method": "gptq", "damp": True}, "damp must be float, not True"),
            ({"method": "gptq", "act_order": 0}, "act_order must be bool, not 0"),
            ({"method": "rtn", "bits": 1}, "bits must be 2 to 8, not 1"),
            ({"method": "rtn", "group_size": -2}, "group_size must be positive, or -1"),
            ({"method": "gptq", "damp": 0}, "damp must be above 0 and at most 1, not 0"),
            ({"method": "gptq", "damp": float("nan")}, "damp must be above 0 and at most 1"),
            (
                {"method": "gptq", "groups": 3},
                "groups must be one of static, aligned, refit, not 3",
            ),
            ({"method": "rtn", "clip": ["mse"]}, "clip must be one of minmax, mse, not ['mse']"),
            (
                {"method": "rtn", "format": "gguf"},
                "format must be one of dense, sparse, ggml, spqr, spqr-replace, not 'gguf'",
            ),
            (
                {"method": "rtn", "format": ["dense"]},
                "format must be one of dense, sparse, ggml, spqr, spqr-replace, not ['dense']",
            ),
        ],
    )
    def test_a_rule_with_a_mistake(self, rule: dict[Any, Any], expected: str) -> None:
        message = refusal({"match": "@blocks", **RTN4}, {"match": "@head", **rule})
        assert message.startswith(f"rule 2 of plan 'plan': {expected}")

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (None, "must be a mapping with a list of `rules`"),
            ([], "must be a mapping with a list of `rules`"),
            ({}, "must be a mapping with a list of `rules`"),
            ({"rules": {"match": "*"}}, "must be a mapping with a list of `rules`"),
            ({"rules": [], "presets": 1, 2: 3}, "has unknown keys: 2, presets"),
            ({"rules": ["*"]}, "rule 1 of plan 'p' must be a mapping with a `match` pattern"),
            ({"rules": [RTN4]}, "rule 1 of plan 'p' must be a mapping with a `match` pattern"),
            ({"rules": [{"match": 3}]}, "must be a mapping with a `match` pattern"),
        ],
    )
    def test_a_plan_with_a_mistake(self, value: Any, expected: str) -> None:
        with pytest.raises(PlanError) as refused:
            Plan.from_dict(value, "p")
        assert expected in str(refused.value)
        assert "plan 'p'" in str(refused.value)

    def test_presets(self) -> None:
        with pytest.raises(PlanError, match="preset 'rtn': rtn has no parameter 'act_order'"):
            Plan.preset("rtn", act_order=True)
        for name in ("nf4", "keep"):
            with pytest.raises(PlanError, match=f"preset must be one of rtn, .*, not '{name}'"):
                Plan.preset(name)
        with pytest.raises(PlanError, match="preset 'spqr-3bit': spqr has no parameter 'tau'"):
            Plan.preset("spqr-3bit", tau=0.2)
        assert (
            Plan.preset("spqr-3bit", bits=5).rules[0].scheme
            == Plan.preset("spqr", bits=5, group_size=16).rules[0].scheme
        )

    @pytest.mark.parametrize("bits", [1, 9])
    def test_bits_of_a_head(self, bits: int) -> None:
        with pytest.raises(PlanError, match=r"the head of plan 'rtn-4bit-g64'.*bits"):
            Plan.preset("rtn").with_head(bits)

    def test_every_preset_says_what_it_means(self) -> None:
        for name, named in PRESETS.items():
            plan, fields = Plan.preset(name), dict(named)
            assert plan.true_sequential == fields.pop("true_sequential", True)
            scheme = plan.rules[0].scheme
            assert scheme is not None
            if isinstance(scheme, AdaDim):
                assert fields.pop("method") == "adadim"
                assert fields.pop("objective", "output") == scheme.objective
                fields["method"] = fields.pop("inner")
                assert [one.spec.group_axis for one in scheme.choices] == ["in", "out"]
            for one in scheme.choices if isinstance(scheme, AdaDim) else (scheme,):
                assert fields.items() <= one.as_dict().items()
                assert one.format == ("sparse" if one.method == "spqr" else "dense")
        for name, bits in BEST.items():
            best = Plan.preset(name)
            assert best.tune is not None
            assert best.tune.block_steps == 0  # blocks that were compensated gain nothing
            assert replace(best, tune=None, name="") == replace(
                Plan.budget(bits, ("in", "out")), name="", loss_weights=True, compensate=True
            )
            with pytest.raises(PlanError, match=r"leave out bits, or give --bits-per-weight"):
                Plan.preset(name, bits=3)
        faithful = Plan.preset("spqr-faithful").rules[0].scheme
        assert faithful is not None
        assert (faithful.solver, faithful.spec) == (FAITHFUL, FAITHFUL_SPEC)


class TestBudgets:
    RULES: ClassVar = [{"match": "@blocks", "method": "search"}]
    CHOICES: ClassVar = [
        {"method": "spqr", "bits": bits, "group_size": 16 * bits} for bits in (3, 4, 6)
    ]

    def budget(self, **changes: Any) -> Plan:
        plain = {"rules": self.RULES, "choices": self.CHOICES, "bits_per_weight": 4.0}
        return Plan.from_dict({k: v for k, v in {**plain, **changes}.items() if v is not None})

    def test_a_budget_is_plain_values(self) -> None:
        for plan in (self.budget(), Plan.budget(3.5)):
            assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan

    def test_only_choices_whose_groups_tile_a_layer_are_its_own(self) -> None:
        layers = [
            Layer("model.layers.0.a", 8, 192, "block", 0, 0),
            Layer("model.layers.0.b", 8, 96, "block", 0, 0),
        ]
        decisions = self.budget().resolve(layers)
        assert [[c.spec.bits for c in d.choices] for d in decisions] == [[3, 4, 6], [3, 6]]

    def test_shares_may_be_percentages_and_numbers_text(self) -> None:
        found = scheme_from({"method": "spqr", "outliers": "1%", "damp": "1e-3"}, "here")
        assert found is not None
        assert found == scheme_from({"method": "spqr", "outliers": 0.01, "damp": 0.001}, "here")

    @quick
    @given(
        st.floats(3.6, 10.0), st.sampled_from([(64, 512), (576, 192), (48, 1024)]), st.booleans()
    )
    def test_an_average_is_met_by_as_many_outliers_as_it_has_room_for(
        self, average: float, shape: tuple[int, int], as_choice: bool
    ) -> None:
        fields = {"method": "spqr", "bits": 3, "average_bits": average}
        layer = Layer("model.layers.0.a", *shape, "block", 0, 0)
        if as_choice:
            rule = {"match": "@blocks", "method": "adadim", "choices": [fields, {"method": "rtn"}]}
        else:
            rule = {"match": "@blocks", **fields}
        plan = Plan.from_dict({"rules": [rule]})
        assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
        [decision] = plan.resolve([layer])
        settled = decision.choices[0] if as_choice else decision.scheme
        assert settled is not None
        assert not settled.average_bits
        bits = settled.nbytes(layer) * 8 / layer.weights
        assert average - 40 / layer.weights <= bits <= average  # one outlier takes up to 5 bytes
        assert isinstance(settled.solver, SpQR)
        assert 0 < settled.solver.outliers < 0.5

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"average_bits": 3.2},
                r"layers\.0\.a: average_bits must be from 3\.\d+ \(no outliers",
            ),
            ({"average_bits": 15.9}, "average_bits must be from"),
            ({"average_bits": -1}, "above 0 and at most 16, not -1"),
            ({"average_bits": "nan"}, "above 0 and at most 16, not nan"),
            ({"average_bits": 3.5, "outliers": "1%"}, "without `outliers`"),
            ({"average_bits": 3.5, "method": "gptq"}, "gptq has no parameter 'average_bits'"),
        ],
    )
    def test_averages_that_cannot_be_are_refused(
        self, fields: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(PlanError, match=message):
            Plan.from_dict(
                {"rules": [{"match": "@blocks", "method": "spqr", "bits": 3, **fields}]}
            ).resolve([Layer("model.layers.0.a", 64, 512, "block", 0, 0)])

    def test_a_layer_that_no_choice_fits_is_refused(self) -> None:
        with pytest.raises(PlanError, match=r"does not divide 100 inputs of model\.layers\.0\.a"):
            self.budget().resolve([Layer("model.layers.0.a", 8, 100, "block", 0, 0)])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"bits_per_weight": None}, "belong together"),
            ({"choices": None}, "belong together"),
            ({"rules": [{"match": "@blocks", "method": "rtn"}]}, "belong together"),
            ({"bits_per_weight": "few"}, "bits_per_weight must be a number, not 'few'"),
            ({"bits_per_weight": "1700%"}, "above 0 and at most 16, not 17.0"),
            ({"bits_per_weight": -1}, "above 0 and at most 16, not -1.0"),
            ({"choices": {}}, "choices must be a list of mappings"),
            ({"choices": [{"method": "rtn"}]}, "choices must be of method spqr, not rtn"),
            (
                {
                    "choices": [
                        {
                            "method": "spqr",
                            "format": "spqr",
                            "bits": 3,
                            "zero_bits": 3,
                            "stat_group_size": 16,
                        }
                    ]
                },
                "format 'spqr' is no choice",
            ),
            ({"choices": [{"method": "keep"}]}, "method 'keep' is no choice"),
            ({"choices": [{"method": "spqr", "bits": 9}]}, "choice 1 of plan 'plan': bits must be"),
            (
                {"rules": [{"match": "@blocks", "method": "search", "bits": 3}]},
                "method 'search' takes no parameters",
            ),
            ({"bits_per_weight": 2.0}, "at least 3"),
        ],
    )
    def test_budgets_with_a_mistake(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(PlanError, match=message):
            self.budget(**changes).resolve([Layer("model.layers.0.a", 8, 192, "block", 0, 0)])


@quick
@given(
    group_size=st.integers(1, 200),
    inputs=st.lists(st.integers(1, 200), min_size=1, max_size=4),
)
def test_a_plan_is_refused_exactly_when_groups_do_not_tile(
    group_size: int, inputs: list[int]
) -> None:
    layers = [Layer(f"layers.{n}.fc", 8, width, "block", n, 0) for n, width in enumerate(inputs)]
    plan = Plan.preset("rtn", group_size=group_size)
    wrong = [layer for layer in layers if layer.in_features % group_size]
    if not wrong:
        assert len(plan.resolve(layers)) == len(layers)
        return
    with pytest.raises(PlanError) as refused:
        plan.resolve(layers)
    for layer in layers:
        assert (layer.name in str(refused.value)) == (layer in wrong)


class TestPlainValues:
    @pytest.mark.parametrize("method", METHODS)
    def test_every_default_is_spelled_out(self, method: str) -> None:
        rule = Plan.preset(method).as_dict()["rules"][0]
        solver = METHODS[method]()
        assert set(rule) == {
            "match",
            "method",
            "format",
            *(vars(QuantSpec()).keys() - set(RARE)),
            *(vars(solver).keys() - {SWEEPS}),  # which older plans do not know
        }

    @quick
    @given(
        method=st.sampled_from(sorted(METHODS)),
        bits=st.integers(2, 8),
        group_size=st.sampled_from([-1, 1, 64]),
        sym=st.booleans(),
        clip=st.sampled_from(["minmax", "mse"]),
        kept=st.booleans(),
    )
    def test_round_trip(
        self, method: str, bits: int, group_size: int, sym: bool, clip: str, kept: bool
    ) -> None:
        scheme = {"bits": bits, "group_size": group_size, "sym": sym, "clip": clip}
        preset = Plan.preset(method, **scheme)
        rules = (Rule("lm_head", None), *preset.rules) if kept else preset.rules
        plan = Plan(rules, "mine")
        value = plan.as_dict()
        assert Plan.from_dict(value) == plan
        assert Plan.from_dict(json.loads(json.dumps(value))) == plan
        assert Plan.from_dict(yaml.safe_load(yaml.safe_dump(value))) == plan

    def test_scheme_round_trip_keeps_solver_parameters(self) -> None:
        scheme = Scheme(GPTQ(0.05, False, "refit", 64, "minmax"), QuantSpec(3, 32, True))
        assert scheme_from(scheme.as_dict(), "here") == scheme
        assert scheme.method == "gptq"

    def test_whole_numbers_are_fine_for_float_parameters(self) -> None:
        scheme = scheme_from({"method": "gptq", "damp": 1}, "here")
        assert scheme is not None
        assert scheme.solver == GPTQ(damp=1.0)

    def test_names_of_presets(self) -> None:
        assert Plan.preset("gptq", bits=3, group_size=128).name == "gptq-3bit-g128"
        assert Plan.preset("rtn", bits=8, group_size=-1).name == "rtn-8bit-row"

    def test_size_of_a_layer_by_hand(self) -> None:
        # 10 rows of 48 codes at 3 bits are 180 bytes; 30 groups have 60 bytes of scales and
        # 90 bits of zeros; the order of 48 inputs takes 96 bytes.
        layer = Layer("x", 10, 48, "block", 0, 0)
        assert Scheme(RTN(), QuantSpec(3, 16)).nbytes(layer) == 180 + 60 + 12
        assert Scheme(GPTQ(groups="refit"), QuantSpec(3, 16)).nbytes(layer) == 180 + 60 + 12 + 96


YAML = """
name: mixed
rules:
  - {match: '@head', method: rtn, bits: 8, group_size: -1}
  - match: '*.q_proj'
    method: keep
  - match: '@blocks'
    method: gptq
    bits: 3
    group_size: 16
"""
MIXED = Plan(
    (
        Rule("@head", Scheme(RTN(), QuantSpec(8, -1))),
        Rule("*.q_proj", None),
        Rule("@blocks", Scheme(GPTQ(), QuantSpec(3, 16))),
    ),
    "mixed",
)


class TestFiles:
    def test_yaml(self, tmp_path: Path) -> None:
        path = tmp_path / "p.yaml"
        path.write_text(YAML)
        assert Plan.from_file(path) == MIXED
        assert Plan.from_file(str(path)) == MIXED

    def test_json(self, tmp_path: Path) -> None:
        path = tmp_path / "p.json"
        for plan in (MIXED, Plan.preset("gptq", damp=1e-5)):
            for indent in (None, 2, "\t"):
                path.write_text(json.dumps(plan.as_dict(), indent=indent))
                assert Plan.from_file(path) == plan

    def test_broken_json(self, tmp_path: Path) -> None:
        path = tmp_path / "p.json"
        path.write_text('{"rules": [')
        with pytest.raises(PlanError, match=r"plan .*p\.json cannot be read"):
            Plan.from_file(path)

    def test_a_plan_without_a_name_has_its_files(self, tmp_path: Path) -> None:
        path = tmp_path / "careful.yaml"
        path.write_text("rules: [{match: '*', method: rtn}]")
        assert Plan.from_file(path).name == "careful"

    @pytest.mark.parametrize("name", ["broken.yaml", "broken.json"])
    @pytest.mark.parametrize(
        "data", [b"rules: [", b"\xff\xfe\xff", b"a: b: c", b"\x00", b"[" * 10**5]
    )
    def test_unreadable_files_are_named(self, tmp_path: Path, data: bytes, name: str) -> None:
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(PlanError, match=r"plan .*broken\..* cannot be read"):
            Plan.from_file(path)

    @pytest.mark.parametrize("long", ["é" * 5000, 10**400], ids=["text", "number"])
    @pytest.mark.parametrize(
        "field", ["bits", "method", "scale_bits", "group_axis", "sym", "format", "clip"]
    )
    def test_values_of_any_length_are_cut_in_messages(self, field: str, long: object) -> None:
        with pytest.raises(PlanError, match=field) as raised:
            Plan.from_dict({"rules": [{"match": "*", "method": "rtn", field: long}]})
        assert len(str(raised.value)) < 300

    def test_names_are_short(self) -> None:
        with pytest.raises(PlanError, match="at most 80 characters"):
            Plan.from_dict({"name": "x" * 81, "rules": [{"match": "*", "method": "rtn"}]})

    def test_missing_files_are_named(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.yaml", tmp_path):
            with pytest.raises(PlanError, match="cannot be read"):
                Plan.from_file(path)

    def test_no_code_runs_from_a_plan(self, tmp_path: Path) -> None:
        path = tmp_path / "evil.yaml"
        path.write_text(f"!!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
        with pytest.raises(PlanError, match="cannot be read"):
            Plan.from_file(path)
        assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": "quick"}, "tune must be a Tuning, not 'quick'"),
        ({"transforms": ("rotate",)}, r"transforms must be Rotate, not \('rotate',\)"),
    ],
)
def test_fields_of_another_type_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(Plan.preset("gptq"), **changes)
