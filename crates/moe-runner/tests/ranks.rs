//! The layer over many ranks (threads of this process) equals the layer on one.

mod layers;

use layers::{forward, nmse, options, rows, runner, sizes, split, splits, truth, variants};
use moe_kernels::numerics::quantise::{GroupScale, Qdq};
use moe_kernels::pool::Inline;
use moe_runner::Error;
use moe_runner::comm::{Kind, Sizes};
use moe_runner::hidden::ActivationDtype::{Bf16, F16, F32};
use moe_runner::parallel::{ExchangeKind, Parallel};
use moe_runner::shared_experts::SharedOrder;
use moe_runner::spec::{Dims, Granularity};
use moe_runner::weights::{
    Element, FloatType, LoadedLayer, RandomFormat, RandomScaled, ScaleType, random_layer,
};

const WIDTH: usize = 48;

#[test]
fn every_split_of_every_option_equals_one_rank() {
    let options = options(None, F32);
    for (name, spec) in variants() {
        let layer = random_layer(&spec, FloatType::F32, 11).unwrap();
        for tokens in [1, 7] {
            let hidden = rows(F32, tokens, WIDTH, tokens as u64);
            let truth = truth(&layer, &hidden);
            let one = forward(&mut runner(&layer, None, F32), &hidden);
            for (split_name, parallel) in splits() {
                let sliced = parallel.sizes.moe_tp() > 1;
                let got = match split(&layer, &options, &parallel, &hidden) {
                    Ok(got) => got.output,
                    Err(Error::Spec { reason, .. }) if sliced && spec.expert.norm.is_some() => {
                        assert!(reason.contains("expert parallelism"), "{reason}");
                        continue;
                    }
                    Err(error) => panic!("{name}, {split_name}: {error}"),
                };
                let error = nmse(&got, &truth);
                assert!(error <= 1e-11, "{name}, {split_name}, {tokens} tokens: NMSE {error:e}");
                let whole = parallel.sizes.use_ep() && parallel.exchange == ExchangeKind::Auto;
                // sums over shared experts' slices differ in order; nothing else does
                if whole && (spec.shared.is_none() || parallel.sizes.tp == 1) {
                    assert_eq!(got, one, "{name}, {split_name}: only the placement differs");
                }
            }
        }
    }
}

/// What a transform makes of a 16-bit row has more than 16 bits, and travels whole.
#[test]
fn rows_of_sixteen_bit_layers_travel_as_they_are() {
    for dtype in [Bf16, F16] {
        let (options, hidden) = (options(None, dtype), rows(dtype, 13, WIDTH, 6));
        for (name, spec) in variants() {
            if !["plain", "latent", "latent with norm"].contains(&name) {
                continue;
            }
            let layer = random_layer(&spec, FloatType::Bf16, 12).unwrap();
            let one = forward(&mut runner(&layer, None, dtype), &hidden);
            for ranks in [2, 3] {
                let parallel = Parallel { sizes: sizes(1, ranks, 1, true), ..Parallel::default() };
                let got = split(&layer, &options, &parallel, &hidden).unwrap().output;
                assert_eq!(got, one, "{name}, {dtype:?}, {ranks} ranks");
            }
        }
    }
}

#[test]
fn the_order_of_shared_experts_changes_no_bit() {
    let mut spec = layers::plain();
    spec.shared = Some(layers::shared());
    let layer = random_layer(&spec, FloatType::F32, 1).unwrap();
    let hidden = rows(F32, 13, WIDTH, 4);
    let options = options(None, F32);
    for sizes in [Sizes::default(), sizes(2, 2, 1, true), sizes(2, 1, 1, false)] {
        let orders =
            [SharedOrder::NoOverlap, SharedOrder::DuringCombine, SharedOrder::SecondThread];
        let outputs: Vec<Vec<f32>> = orders
            .iter()
            .map(|&order| {
                let parallel = Parallel { sizes, order, ..Parallel::default() };
                split(&layer, &options, &parallel, &hidden).unwrap().output
            })
            .collect();
        assert_eq!(outputs[0], outputs[1], "{sizes:?}");
        assert_eq!(outputs[0], outputs[2], "{sizes:?}");
    }
}

#[test]
fn all_to_all_without_whole_experts_is_refused() {
    let layer = random_layer(&layers::plain(), FloatType::F32, 1).unwrap();
    let parallel = Parallel {
        sizes: sizes(2, 1, 1, false),
        exchange: ExchangeKind::AllToAll,
        ..Parallel::default()
    };
    let error = split(&layer, &options(None, F32), &parallel, &rows(F32, 2, WIDTH, 1))
        .unwrap_err()
        .to_string();
    assert!(error.contains("needs expert parallelism"), "{error}");
}

/// Too many rows for an expert are an error of the exchange, never dropped.
#[test]
fn a_batch_beyond_its_capacity_is_refused() {
    use moe_runner::exchange::{BatchedExchange, Exchange, LocalExchange, LocalRows};
    use moe_runner::router::{LogicalId, Routing};
    let ids = [0, 1, 0, 1, 0, 2].map(LogicalId).to_vec();
    let routing = Routing::from_parts(2, ids, vec![0.5; 6]).unwrap();
    let hidden: Vec<f32> = (0..12).map(|v| v as f32).collect();
    let rows = LocalRows::new(&hidden, 4, &routing);
    let mut exchange = BatchedExchange::new(Box::new(LocalExchange::new(3)), Some(3));
    exchange.start_dispatch(0, rows, &Inline).unwrap();
    let batched = exchange.finish_dispatch(0, rows, &Inline).unwrap();
    // expert 0 has rows 0, 1, 2; expert 1 rows 0, 1; expert 2 row 2; three places each
    let copies: Vec<f32> = batched.hidden.chunks_exact(4).map(|row| row[0]).collect();
    assert_eq!(copies, [0.0, 4.0, 8.0, 0.0, 4.0, 0.0, 8.0, 0.0, 0.0]);
    assert_eq!((batched.top_k, batched.ids.len()), (1, 9));
    let mut exchange = BatchedExchange::new(Box::new(LocalExchange::new(3)), Some(2));
    exchange.start_dispatch(0, rows, &Inline).unwrap();
    let error = exchange.finish_dispatch(0, rows, &Inline).unwrap_err().to_string();
    assert!(error.contains("an expert has 3 rows; its capacity is 2"), "{error}");
}

/// Ranks with slices of a row quantise it as the whole row would be: what differs from one rank is the
/// order of sums, far below a step of eight bits.
#[test]
fn slices_are_quantised_by_the_whole_rows_largest_value() {
    let options = options(None, F32);
    let hidden = rows(F32, 5, WIDTH, 9);
    for (element, input) in [(Element::E4m3, Qdq::Fp8Token), (Element::Int8, Qdq::Int8Token)] {
        let format = RandomFormat::Scaled(RandomScaled {
            element,
            scales: ScaleType::F32,
            granularity: Granularity::Channel,
            block: [0, 0],
            input: Some(input),
        });
        let layer = random_layer(&layers::plain(), format, 5).unwrap();
        let one = forward(&mut runner(&layer, None, F32), &hidden);
        let one: Vec<f64> = one.into_iter().map(f64::from).collect();
        for tp in [2, 4] {
            let parallel = Parallel { sizes: sizes(tp, 1, 1, false), ..Parallel::default() };
            let got = split(&layer, &options, &parallel, &hidden).unwrap().output;
            let error = nmse(&got, &one);
            assert!(error <= 1e-11, "{input:?} on {tp} ranks: NMSE {error:e}");
        }
    }
}

/// Rows that every expert would quantise alike travel as codes: fewer bytes, and not a bit changes.
#[test]
fn rows_are_quantised_before_they_travel() {
    let mut spec = layers::plain();
    spec.dims = Dims { hidden: 256, routed_hidden: 256, intermediate: 128 };
    let parallel = Parallel { sizes: sizes(1, 2, 1, true), ..Parallel::default() };
    // the same seed draws the same gate: both layers send the same rows
    for (dtype, element, input) in [
        (F32, Element::E4m3, Qdq::Fp8Token),
        (F32, Element::Int8, Qdq::Int8Token),
        (Bf16, Element::E4m3, Qdq::Fp8Token),
        (Bf16, Element::E4m3, Qdq::Fp8Group { size: 64, scale: GroupScale::PowerOfTwo }),
        (Bf16, Element::Int8, Qdq::Int8Group { size: 64 }),
    ] {
        let options = options(None, dtype);
        let hidden = rows(dtype, 600, 256, 8);
        let run = |layer: &LoadedLayer| split(layer, &options, &parallel, &hidden).unwrap();
        let sent = |layer: &LoadedLayer| run(layer).traffic.of(Kind::AllToAllV).sent;
        let (granularity, block) = match input {
            Qdq::Fp8Group { size, .. } | Qdq::Int8Group { size } => (Granularity::Group, [1, size]),
            _ => (Granularity::Channel, [0, 0]),
        };
        let format = |input| {
            let scales = ScaleType::F32;
            RandomFormat::Scaled(RandomScaled { element, scales, granularity, block, input })
        };
        let layer = random_layer(&spec, format(Some(input)), 5).unwrap();
        let one = forward(&mut runner(&layer, None, dtype), &hidden);
        assert_eq!(run(&layer).output, one, "{input:?}");
        let plain = random_layer(&spec, format(None), 5).unwrap();
        // 256 values became one byte each and scales, for every row that travelled
        let scales = 256usize.checked_div(block[1]).unwrap_or(1);
        let spared = (256 * dtype.size() - 256 - 4 * scales) as u64;
        let rows_sent = (sent(&plain) - sent(&layer)) / spared;
        assert_eq!((sent(&plain) - sent(&layer)) % spared, 0);
        assert!((1..=600).contains(&rows_sent), "{input:?}: {rows_sent} rows");
    }
}
