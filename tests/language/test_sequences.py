"""Sequences: what local functions do with a client's examples."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedjax_core as fc
from fedjax_core.errors import ArgumentError, FederatedTypeError

NAN = np.float32(np.nan)
CAPACITY = 6
LAYOUTS = ("padded", "packed")

# Values on a grid of quarters, so that sums are exact in any order.
examples = st.lists(
    st.tuples(st.integers(-40, 40).map(lambda n: n / 4), st.integers(-100, 100)), max_size=5
)


def sequence(rows, layout="padded", capacity=CAPACITY):
    """Pairs of a float and an int8 as a sequence; NaN and 99 stand wherever no example does."""
    start, size = (0, capacity) if layout == "padded" else (3, 12)
    x, n = np.full(size, NAN), np.full(size, 99, np.int8)
    x[start : start + len(rows)] = [row[0] for row in rows]
    n[start : start + len(rows)] = [row[1] for row in rows]
    elements = {"x": jnp.asarray(x), "n": jnp.asarray(n)}
    return fc.Sequence(elements, jnp.int32(start), jnp.int32(len(rows)), capacity)


def floats(values, capacity=CAPACITY):
    rows = sequence([(value, 0) for value in values], capacity=capacity)
    return dataclasses.replace(rows, elements=rows.elements["x"])


def padded(values, capacity):
    values = np.asarray(values)
    return np.pad(values, [(0, capacity - len(values))] + [(0, 0)] * (values.ndim - 1))


@functools.cache
def compiled(function):
    """The function as it is, under jit, and under jit and vmap; kept, to be compiled once."""
    return function, jax.jit(function), jax.jit(jax.vmap(function))


def in_all_ways(function, rows):
    """`function(rows)` as it is, compiled, and as the second of three lanes of other lengths."""
    plain, jitted, mapped = compiled(function)
    empty = jax.tree.map(jnp.zeros_like, rows)
    lanes = jax.tree.map(lambda *x: jnp.stack(x), empty, rows, empty)
    return [plain(rows), jitted(rows), jax.tree.map(lambda x: x[1], mapped(lanes))]


def use_all_methods(s):
    mapped = s.map(lambda e: (2 * e["x"], e["n"] > 0))
    folded = s.reduce((0.0, 0), lambda a, e: (a[0] / 2 + e["x"], a[1] + e["n"]))
    carry, sums = s.scan(0.0, lambda c, e: (c + e["x"], c))
    return mapped, folded, carry, sums, s.sum()


@functools.cache
def batching(size, drop_remainder):
    return lambda s: s.batch(size, drop_remainder)


# Methods against loops in NumPy


@given(rows=examples, layout=st.sampled_from(LAYOUTS))
@settings(max_examples=15, deadline=None)
def test_methods_agree_with_loops(rows, layout):
    x, n = [row[0] for row in rows], [row[1] for row in rows]
    total = 0.0
    for value in x:
        total = total / 2 + value
    before = np.float32(np.cumsum([0.0, *x])[:-1])
    for mapped, folded, carry, sums, added in in_all_ways(use_all_methods, sequence(rows, layout)):
        assert int(mapped.length) == int(sums.length) == len(rows)
        assert int(mapped.start) == int(sums.start) == 0
        np.testing.assert_array_equal(mapped.elements[0], padded(2 * np.float32(x), CAPACITY))
        np.testing.assert_array_equal(mapped.elements[1], padded(np.array(n) > 0, CAPACITY))
        np.testing.assert_allclose(folded[0], total, rtol=1e-6)
        assert int(folded[1]) == sum(n)
        np.testing.assert_array_equal(carry, np.float32(sum(x)))
        np.testing.assert_array_equal(sums.elements, padded(before, CAPACITY))
        assert added["x"] == np.float32(sum(x))
        assert added["x"].dtype == np.float32
        assert added["n"] == np.clip(sum(n), -128, 127)
        assert added["n"].dtype == np.int8


@given(
    rows=examples,
    layout=st.sampled_from(LAYOUTS),
    size=st.sampled_from([1, 2, 4]),
    drop_remainder=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_batches_agree_with_slices(rows, layout, size, drop_remainder):
    x = np.float32([row[0] for row in rows])
    slices = [x[i : i + size] for i in range(0, len(x), size)]
    slices = [s for s in slices if len(s) == size or not drop_remainder]
    capacity = CAPACITY // size if drop_remainder else -(-CAPACITY // size)
    masks = [padded(np.ones(len(s), bool), size) for s in slices]
    blank = np.zeros((0, size))
    wanted = padded([padded(s, size) for s in slices] or blank, capacity)
    wanted_mask = padded(masks or blank.astype(bool), capacity)
    for batches in in_all_ways(batching(size, drop_remainder), sequence(rows, layout)):
        assert batches.capacity == capacity
        assert int(batches.length) == len(slices)
        np.testing.assert_array_equal(batches.elements.examples["x"], wanted)
        np.testing.assert_array_equal(batches.elements.mask, wanted_mask)


def test_batches_can_be_folded():
    """The masked mean of each batch, added up: means 1.5 and 3 of [1, 2] and [3]."""

    def mean(batch):
        return jnp.sum(batch.examples) / jnp.sum(batch.mask)

    batches = floats([1, 2, 3]).batch(2)
    assert float(batches.reduce(0.0, lambda total, batch: total + mean(batch))) == 4.5
    assert float(batches.map(mean).sum()) == 4.5


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None])
def test_a_batch_size_is_a_positive_int(size):
    with pytest.raises(ArgumentError, match="batch size of at least 1"):
        floats([1]).batch(size)


# Accumulation


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        (np.int8, 100, 127),
        (np.int8, -100, -128),
        (np.uint8, 100, 255),
        (np.int16, 100, 30_000),
        (jnp.int4, 5, 7),
        (jnp.bfloat16, 1, 300),
        (np.float16, 400, np.inf),
        (jnp.float8_e4m3fn, 1, 288),
        (np.complex64, 1j, 300j),
    ],
    ids=lambda x: np.dtype(x).name if isinstance(x, type) else None,
)
def test_small_dtypes_are_summed_in_32_bits(dtype, value, expected):
    """300 equal numbers; bfloat16 alone would stop counting at 256."""
    total = fc.Sequence.from_elements(jnp.full(300, value, dtype)).sum()
    assert total.dtype == dtype
    assert total == jnp.asarray(expected, dtype)


@pytest.mark.parametrize("dtype", [np.bool_, "key"])
def test_sum_takes_numbers_only(dtype):
    x = jax.random.split(jax.random.key(0), 2) if dtype == "key" else jnp.zeros(2, dtype)
    with pytest.raises(FederatedTypeError, match=r"expected numbers, got .* at \['x'\]"):
        fc.Sequence.from_elements({"x": x}).sum()


def test_elements_may_be_keys():
    keys = jax.random.split(jax.random.key(0), 3)
    rows = fc.Sequence.from_elements(keys, length=2)
    draws = rows.map(jax.random.bits)
    np.testing.assert_array_equal(draws.elements[:2], jax.vmap(jax.random.bits)(keys[:2]))
    last = rows.reduce(jax.random.key(7), lambda _, key: key)
    assert jnp.array_equal(jax.random.key_data(last), jax.random.key_data(keys[1]))
    carry, _ = rows.scan(jax.random.key(7), lambda _, key: (key, ()))
    assert jnp.array_equal(jax.random.key_data(carry), jax.random.key_data(keys[1]))
    assert rows.batch(2).capacity == 2


# Padding


def test_padded_steps_leave_the_carry_bit_for_bit():
    """J-33, with a step that divides by what is in the padding, and a carry of every kind."""
    init = (jnp.float32(-0.0), jnp.float32(NAN), jnp.int32(3), jnp.array([True, False]))

    def step(carry, x):
        return (carry[0] / x, carry[1] * x, carry[2] + 1, ~carry[3]), x

    for rows in (sequence([]), sequence([], "packed")):
        rows = dataclasses.replace(rows, elements=0 * rows.elements["n"].astype(np.float32))
        carry, outputs = jax.jit(lambda s: s.scan(init, step))(rows)
        for new, old in zip(carry, init, strict=True):
            assert np.asarray(new).tobytes() == np.asarray(old).tobytes()
        np.testing.assert_array_equal(outputs.elements, np.zeros(CAPACITY))


def test_gradients_of_a_scan_are_those_of_a_loop():
    """c -> w c + x^2 over [1, 2, 3]: d/dw, d/dc0 and d/dx in closed form, NaN in the padding."""

    def value(w, c, x):
        rows = fc.Sequence(x, jnp.int32(0), jnp.int32(3), CAPACITY)
        return rows.scan(c, lambda c, x: (w * c + x**2, ()))[0]

    def loop(w, c, x):
        for i in range(3):
            c = w * c + x[i] ** 2
        return c

    x, w, c = jnp.array([1, 2, 3, NAN, NAN, NAN]), 0.5, 4.0
    found = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(w, c, x)
    for got, wanted in zip(found, jax.grad(loop, argnums=(0, 1, 2))(w, c, x), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    np.testing.assert_allclose(found[0], 3 * w**2 * c + 2 * w * 1 + 4, rtol=1e-6)
    np.testing.assert_allclose(found[1], w**3)
    np.testing.assert_allclose(found[2], [2 * w**2, 4 * w, 6, 0, 0, 0])
    second = jax.hessian(value)(w, c, x)
    np.testing.assert_allclose(second, 6 * w * c + 2, rtol=1e-6)
    forward = jax.jacfwd(value, argnums=2)(w, c, x)
    np.testing.assert_allclose(forward, found[2], rtol=1e-6)


@pytest.mark.parametrize("method", ["scan", "map"])
@pytest.mark.parametrize("length", [0, 1, 4])
@pytest.mark.parametrize("filler", [0.0, np.nan, np.inf])
def test_gradients_are_finite_whatever_the_padding_holds(method, length, filler):
    """Sum of sqrt(w x), whose derivative is infinite at 0; 0 examples have derivative 0."""

    def total(w, x, length):
        rows = fc.Sequence(x, jnp.int32(0), length, 4)
        if method == "map":
            return rows.map(lambda x: jnp.sqrt(w * x)).sum()
        return rows.scan(0.0, lambda c, x: (c + jnp.sqrt(w * x), ()))[0]

    x = jnp.where(jnp.arange(4) < length, 4.0, filler)
    lanes = jax.vmap(jax.grad(total, argnums=(0, 1)), in_axes=(None, None, 0))
    by_w, by_x = jax.jit(lanes)(1.0, x, jnp.array([length, 0]))
    np.testing.assert_allclose(by_w, [length, 0])  # sqrt(4) / 2 = 1 for each
    np.testing.assert_allclose(by_x, [[0.25] * length + [0] * (4 - length), [0] * 4])


def test_gradient_of_what_a_step_captures_is_finite_where_the_carry_is_singular():
    """After one step the carry is 0, where log has no derivative; no step follows."""

    def value(w):
        return floats([1]).scan(1.0, lambda c, x: (c * 0 + 0 * w * jnp.log(c) + 0, c))[0]

    assert float(jax.grad(value)(2.0)) == 0


def test_shared_weights_stay_shared_among_lanes():
    """Lanes of different lengths do not make a copy each of a matrix that a map captures."""
    w = jnp.ones((7, 7))

    def forward(x, length):
        return fc.Sequence(x, jnp.int32(0), length, 2).map(lambda row: row @ w).sum()

    traced = jax.make_jaxpr(jax.vmap(forward))(jnp.ones((3, 2, 7)), jnp.array([0, 1, 2]))
    assert "f32[3,7,7]" not in str(traced)
    assert "f32[3,2,7,7]" not in str(traced)


# Edges of the interface


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_capacity(layout):
    elements = {"x": jnp.zeros((0, 2))} if layout == "padded" else {"x": jnp.full((5, 2), NAN)}
    rows = fc.Sequence(elements, jnp.int32(0), jnp.int32(0), 0)

    def everything(s):
        carry, outputs = s.scan(1.0, lambda c, e: (c + e["x"][0], e["x"]))
        folded = s.reduce(2.0, lambda c, e: c + e["x"][0])
        return s.map(lambda e: e["x"][0]), carry, outputs, folded, s.sum(), s.batch(2)

    for run in (everything, jax.jit(everything)):
        mapped, carry, outputs, folded, total, batches = run(rows)
        assert mapped.elements.shape == (0,)
        assert outputs.elements.shape == (0, 2)
        assert (float(carry), float(folded)) == (1, 2)
        np.testing.assert_array_equal(total["x"], [0, 0])
        assert batches.elements.examples["x"].shape == (0, 2, 2)


def test_element_type_can_be_read_inside_and_outside():
    rows = sequence([(1, 2)])
    assert str(rows.element_type) == "<n=int8,x=float32>"
    assert rows.element_spec["n"] == jax.ShapeDtypeStruct((), np.int8)
    stacked = jax.tree.map(lambda x: x[None], rows)
    assert stacked.element_type == rows.element_type
    pool = dataclasses.replace(rows, start=jnp.zeros(4), length=jnp.zeros(4), packed=True)
    assert pool.element_type == rows.element_type
    assert str(rows.batch(3).element_type) == "<examples=<n=int8[3],x=float32[3]>,mask=bool[3]>"

    @jax.vmap
    def zeros(s):
        return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), s.element_spec)

    assert zeros(stacked)["n"].shape == (1,)


def test_from_elements():
    rows = fc.Sequence.from_elements({"a": np.zeros((3, 2)), "b": np.arange(3)}, length=2)
    assert (rows.capacity, int(rows.start), int(rows.length), rows.packed) == (3, 0, 2, False)


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ([1, 2, 3], r"leading axis of rows, got 1 at \[0\]"),
        (np.float32(1), r"got .* at the root"),
        ({"a": np.zeros(2), "b": np.zeros(3)}, r"one common number of rows, got .*'b'\]\": 3"),
        ({}, "one common number of rows"),
    ],
    ids=["list", "scalar", "ragged", "empty"],
)
def test_from_elements_refuses(elements, message):
    with pytest.raises(FederatedTypeError, match=message):
        fc.Sequence.from_elements(elements)


@pytest.mark.parametrize("length", [-1, 3])
def test_a_length_is_within_the_rows(length):
    with pytest.raises(ArgumentError, match="length from 0 to 2"):
        fc.Sequence.from_elements(np.zeros(2), length=length)


@pytest.mark.parametrize("use", [len, iter, bool, lambda s: s[0], lambda s: 1 in s])
def test_python_sequence_protocol_is_refused(use):
    with pytest.raises(FederatedTypeError, match=r"float32\* has no Python length.*reduce"):
        use(floats([1, 2]))


def test_stacked_sequences_are_refused():
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), floats([1, 2]))
    for use in (lambda s: s.sum(), lambda s: s.take(jnp.array([0])), lambda s: s.batch(2)):
        with pytest.raises(FederatedTypeError, match=r"those of 2 clients.*federated_map"):
            use(stacked)


@pytest.mark.parametrize("method", ["reduce", "scan"])
@pytest.mark.parametrize(
    ("zero", "operator", "message"),
    [
        (jnp.zeros(2), lambda a, x: a[0] + x, r"the root: expected float32\[2\], got float32\[\]"),
        ({"a": 0.0}, lambda a, x: {"b": x}, r"\['a'\]: expected float32\[\], got nothing"),
        ((0.0,), lambda a, x: (x, x), r"got something at \[1\] too"),
        (0, lambda a, x: a + x, r"expected int32\[\], got float32; start from that dtype"),
        (False, lambda a, x: 1, r"expected bool\[\], got int32"),
        (np.int8(0), lambda a, x: a + jnp.int32(1), r"expected int8\[\], got int32"),
        (0.0, lambda a, x: x + 1j, r"expected float32\[\], got complex64"),
    ],
    ids=["shape", "missing", "extra", "float-to-int", "int-to-bool", "narrower", "complex"],
)
def test_an_accumulator_keeps_its_type(method, zero, operator, message):
    step = operator if method == "reduce" else lambda a, x: (operator(a, x), ())
    with pytest.raises(FederatedTypeError, match=f"Sequence.{method}.*{message}"):
        getattr(floats([1, 2]), method)(zero, step)


def test_what_an_accumulator_holds_is_converted():
    rows = floats([1, 2])
    assert rows.reduce(jnp.bfloat16(0), lambda a, x: a + x).dtype == jnp.bfloat16
    assert rows.reduce(np.uint8(3), lambda a, x: 1).dtype == np.uint8
    assert rows.reduce(1j, lambda a, x: x).dtype == np.complex64
    assert rows.scan([0, 0.0], lambda a, x: ((a[0] + 1, x), a))[0] == [2, 2]


def test_functions_that_return_the_wrong_thing():
    with pytest.raises(FederatedTypeError, match=r"Sequence.map.*got None; add a return"):
        floats([1]).map(lambda x: None)
    with pytest.raises(FederatedTypeError, match=r"Sequence.scan.*\(carry, output\)"):
        floats([1]).scan(0.0, lambda c, x: c + x)


@pytest.mark.parametrize("length", [0, 3, np.int64(2), np.uint8(3), np.array(2), jnp.int32(2)])
def test_a_length_is_an_int(length):
    rows = fc.Sequence.from_elements(jnp.arange(3), length)
    assert (int(rows.length), rows.length.dtype) == (int(length), jnp.int32)


@pytest.mark.parametrize("length", [True, 1.0, "a", [1], np.bool_(1), np.float32(1)], ids=repr)
def test_a_length_that_is_no_int_is_refused(length):
    with pytest.raises(FederatedTypeError, match="Expected an int as the length"):
        fc.Sequence.from_elements(jnp.arange(3), length)


@pytest.mark.parametrize("length", [-1, 4, 2**70, np.int64(9), np.array(-1)], ids=repr)
def test_a_length_that_the_rows_do_not_have_is_refused(length):
    with pytest.raises(ArgumentError, match="Expected a length from 0 to 3"):
        fc.Sequence.from_elements(jnp.arange(3), length)


@pytest.mark.parametrize(("length", "nearest"), [(-5, 0), (2, 2), (7, 3), (2**31 - 1, 3)])
def test_a_length_that_is_not_known_counts_as_the_nearest(length, nearest):
    """1 + 2 + 4, as far as there are rows."""
    x = jnp.array([1, 2, 4])

    @jax.jit
    def all_ways(length):
        s = fc.Sequence.from_elements(x, length)
        add = lambda total, y: (total + y, y)  # noqa: E731
        totals = s.sum(), s.reduce(0, jnp.add), s.scan(0, add)[0], s.map(lambda y: y).sum()
        return totals, s.map(lambda y: y).length, s.batch(2).length

    totals, mapped, batches = all_ways(length)
    assert [int(total) for total in totals] == [sum([1, 2, 4][:nearest])] * 4
    assert (int(mapped), int(batches)) == (nearest, -(-nearest // 2))


@pytest.mark.parametrize("size", [2**31, 2**31 - 1, 2**70])
def test_batches_of_more_examples_than_positions_are_refused(size):
    with pytest.raises(ArgumentError, match="Expected a batch size with which positions fit"):
        fc.Sequence.from_elements(jnp.arange(3)).batch(size)


def test_folds_start_with_numbers_that_jax_holds():
    rows = fc.Sequence.from_elements(jnp.arange(3))
    with pytest.raises(ArgumentError, match=r"Sequence\.reduce: zero: .* holds"):
        rows.reduce(2**40, jnp.add)
    with pytest.raises(ArgumentError, match=r"Sequence\.scan: init: .* holds"):
        rows.scan(2**70, lambda total, x: (total + x, x))


@pytest.mark.filterwarnings("ignore:Data type alias")
@pytest.mark.parametrize("text", ["a", "2"])
def test_folds_do_not_start_with_text(text):
    rows = fc.Sequence.from_elements(jnp.arange(3))
    with pytest.raises(FederatedTypeError, match=r"Sequence\.reduce: zero: .* got '[a2]'"):
        rows.reduce(text, jnp.add)
