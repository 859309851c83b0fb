"""Outlier measures: against scipy and definitions, as a stream, as metrics, over two processes."""

import copy
import math
import pickle

import pytest
import scipy.stats
import torch
from torchmetrics import MetricCollection

from lightning_bfmoe.errors import BFMoEError, ConfigError, ShapeError
from lightning_bfmoe.functional import outliers
from lightning_bfmoe.metrics import (
    CrestFactor,
    ExcessKurtosis,
    Incoherence,
    OutlierMeasures,
    QuantizationSNR,
    TailShare,
)
from tests.metrics.ranks import run_on_two_ranks


def snr_by_loop(x, bits):
    """Row by row, number by number, in Python."""
    levels, total = 2 ** (bits - 1) - 1, []
    for row in x.double().tolist():
        step = max(abs(v) for v in row) / levels
        noise = sum((round(v / step) * step - v) ** 2 for v in row)
        total.append(10 * math.log10(sum(v * v for v in row) / noise))
    return sum(total) / len(total)


def tail_by_loop(x):
    z = scipy.stats.zscore(x.double().numpy(), axis=1)
    return float((abs(z) > 6).mean())


ORACLES = {
    "kurtosis": lambda x: scipy.stats.kurtosis(x.double().numpy(), axis=None),
    "crest": lambda x: (x.double().abs().max() / x.double().square().mean().sqrt()).item(),
    "tail_share": tail_by_loop,
    "incoherence": lambda x: (
        (x.double().abs().amax(1) / x.double().square().mean(1).sqrt()).mean().item()
    ),
    "snr_int8": lambda x: snr_by_loop(x, 8),
    "snr_int4": lambda x: snr_by_loop(x, 4),
}
PAIRS = {
    "kurtosis": (outliers.excess_kurtosis, ExcessKurtosis),
    "crest": (outliers.crest_factor, CrestFactor),
    "tail_share": (outliers.tail_share, TailShare),
    "incoherence": (outliers.incoherence, Incoherence),
    "snr_int8": (lambda x: outliers.quantization_snr(x, 8), lambda: QuantizationSNR(8)),
    "snr_int4": (lambda x: outliers.quantization_snr(x, 4), lambda: QuantizationSNR(4)),
}


def rows(n=40, d=48, dtype=torch.float32, seed=0):
    """Activations with two outlier channels, one of which dominates some rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    x[:, 5] *= 12
    x[: n // 4, 7] += 90
    return x.to(dtype)


def test_every_measure_has_an_oracle_and_a_metric():
    assert list(ORACLES) == list(PAIRS) == list(outliers.MEASURES)


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_function_and_metric_equal_the_oracle(name, dtype):
    function, metric_class = PAIRS[name]
    x, expected = rows(dtype=dtype), ORACLES[name](rows(dtype=dtype))
    # in float32 a number can stand on the edge between two integers of the grid
    tolerance = 1e-4 if name.startswith("snr") else 1e-12
    assert function(x).item() == pytest.approx(expected, rel=tolerance)
    metric = metric_class()
    assert metric(x).item() == pytest.approx(expected, rel=tolerance)  # value of the batch
    assert metric.compute().dtype == torch.float64
    assert expected not in (0, math.inf), "a trivial value proves nothing"


@pytest.mark.parametrize("name", PAIRS)
def test_a_stream_equals_the_whole(name):
    function, metric_class = PAIRS[name]
    metric, parts = metric_class(), [rows(n, seed=n) for n in (1, 13, 40, 200)]
    for part in parts:
        assert metric(part).item() == pytest.approx(function(part).item(), rel=1e-13)
    whole = torch.cat(parts)
    assert metric.compute().item() == pytest.approx(function(whole).item(), rel=1e-13)
    if not name.startswith("snr"):
        assert metric.compute().item() == pytest.approx(ORACLES[name](whole), rel=1e-12)


@pytest.mark.parametrize(("scale", "mean"), [(1, 100), (1, 1e4), (1e-20, 0), (1e30, 0)])
@pytest.mark.parametrize("name", ORACLES)
def test_neither_a_large_mean_nor_the_scale_matters(name, scale, mean):
    x = (rows(200, 64).double() + mean) * scale
    for dtype in (torch.float32, torch.float64):
        metric = OutlierMeasures()
        for part in x.to(dtype).split(13):
            metric.update(part)
        expected = ORACLES[name](x.to(dtype))
        tolerance = 1e-4 if name.startswith("snr") else 1e-10
        assert metric.compute()[name].item() == pytest.approx(expected, rel=tolerance)


def test_blocks_of_the_cpu_path_change_nothing(monkeypatch):
    x = rows(100)
    whole = outliers.outlier_moments(x)
    monkeypatch.setattr(outliers, "_CACHED", 48 * 7)
    torch.testing.assert_close(outliers.outlier_moments(x), whole, rtol=1e-14, atol=0)


def test_a_normal_distribution_reads_as_one():
    x = torch.randn(500, 256, generator=torch.Generator().manual_seed(1))
    values = outliers.measures_from(outliers.outlier_moments(x))
    assert abs(values["kurtosis"]) < 0.05 and values["tail_share"] == 0
    assert 2.5 < values["incoherence"] < 3.5 < values["crest"] < 6
    # 6.02 dB a bit
    assert values["snr_int8"] - values["snr_int4"] == pytest.approx(6.02 * 4.17, abs=0.5)


def test_a_rotation_that_spreads_an_outlier_shows_in_every_measure():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    x[:, 3] += 40
    from lightning_bfmoe.functional import apply_butterfly, hadamard_angles

    before = outliers.measures_from(outliers.outlier_moments(x))
    after = outliers.measures_from(
        outliers.outlier_moments(apply_butterfly(x, hadamard_angles(64), inverse=True))
    )
    for name in ("kurtosis", "crest", "tail_share", "incoherence"):
        assert after[name] < before[name]
    assert after["snr_int4"] > before["snr_int4"] + 10 and after["snr_int8"] > before["snr_int8"]


def test_rows_of_zeros_are_left_out_of_row_means():
    x = rows(8)
    padded = torch.cat([x, torch.zeros(5, 48)])
    for name in ("tail_share", "incoherence", "snr_int8", "snr_int4"):
        function = PAIRS[name][0]
        assert function(padded).item() == pytest.approx(function(x).item(), rel=1e-13)


def test_what_is_undefined_is_nan():
    constant = outliers.measures_from(outliers.outlier_moments(torch.full((9, 5), 0.1)))
    assert constant["kurtosis"].isnan() and constant["crest"].item() == pytest.approx(1)
    assert outliers.measures_from(outliers.empty_moments())["snr_int8"].isnan()
    with_nan = outliers.measures_from(outliers.outlier_moments(torch.tensor([[1.0, math.nan]])))
    assert all(value.isnan() for value in with_nan.values())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 4), "non-empty float matrix"),
        (torch.ones(2, 3, 4), r"shape \(2, 3, 4\)"),
        (torch.ones(2, 3, dtype=torch.int64), "int64"),
        (torch.tensor([[1.0, math.nan]]), "1 NaN or infinite of 2"),
        (torch.tensor([[1.0, math.inf]]), "finite numbers"),
    ],
)
def test_bad_input_is_an_error(x, message):
    metric = OutlierMeasures()
    with pytest.raises(ShapeError, match=message):
        metric.update(x)
    if x.dim() == 2 and x.is_floating_point():
        with pytest.raises(BFMoEError, match=message):
            outliers.excess_kurtosis(x)
    assert metric.moments.eq(0).all(), "a refused batch leaves no trace"


@pytest.mark.parametrize("make", [QuantizationSNR, lambda b: outliers.quantization_snr(rows(), b)])
def test_other_bits_are_an_error(make):
    with pytest.raises(ConfigError, match="8 or 4 bits"):
        make(3)


def test_pickle_clone_reset_and_state_dict():
    metric = OutlierMeasures()
    metric.update(rows())
    for other in (pickle.loads(pickle.dumps(metric)), metric.clone(), copy.deepcopy(metric)):
        other.update(rows(seed=1))
        assert other.moments[0] == 2 * metric.moments[0]
        other.reset()
        assert other.moments.eq(0).all()
    metric.persistent(True)
    restored = OutlierMeasures()
    restored.load_state_dict(metric.state_dict())
    assert restored.moments.equal(metric.moments)


def test_the_state_stays_exact_whatever_the_type_around_it():
    model = torch.nn.Module()
    model.metric = OutlierMeasures()
    for cast in (model.bfloat16, model.half, lambda: model.metric.set_dtype(torch.float16)):
        model.metric.update(rows())
        cast()
        assert model.metric.moments.dtype == torch.float64
    assert model.metric.moments[0] == 3 * rows().numel()
    x = rows(dtype=torch.float16).requires_grad_()
    with torch.inference_mode():
        model.metric.update(x)
    model.metric.update(x)
    assert not model.metric.moments.requires_grad
    assert model.metric.to("meta").moments.is_meta


def test_a_collection_updates_one_state_for_all():
    collection = MetricCollection([ExcessKurtosis(), CrestFactor(), QuantizationSNR(4)])
    for seed in range(3):
        collection.update(rows(seed=seed))
    assert len(collection.compute_groups) == 1
    whole = torch.cat([rows(seed=seed) for seed in range(3)])
    expected = outliers.crest_factor(whole).item()
    assert collection.compute()["CrestFactor"].item() == pytest.approx(expected, rel=1e-13)


def two_ranks(rank):
    metric = OutlierMeasures()
    metric.update(rows(30 + rank, seed=rank))
    gathered = torch.distributed.all_gather
    calls = []
    torch.distributed.all_gather = lambda *a, **k: (calls.append(a[1].numel()), gathered(*a, **k))
    values = {name: value.item() for name, value in metric.compute().items()}
    torch.distributed.all_gather = gathered
    return values, sum(numel == len(outliers.MOMENTS) for numel in calls)


def test_two_processes_equal_one():
    results = run_on_two_ranks(two_ranks)
    whole = torch.cat([rows(30, seed=0), rows(31, seed=1)])
    expected = outliers.measures_from(outliers.outlier_moments(whole))
    for values, collectives in results:
        assert collectives == 1, "all measures are reduced by one call"
        for name, value in expected.items():
            assert values[name] == pytest.approx(value.item(), rel=1e-13)
