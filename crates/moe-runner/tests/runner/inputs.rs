//! What bad inputs are told: which input, where in it, what is wrong. A runner that refused one goes
//! on with the next.

use half::{bf16, f16};
use moe_runner::hidden::ActivationDtype::{Bf16, F16, F32};
use moe_runner::hidden::{DeviceRows, Rows, RowsMut};
use moe_runner::router::LogicalId;
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, reference};
use moe_runner::spec::{LayerSpec, Selection, Transform, TransformStep};
use moe_runner::weights::{FloatType, LoadedLayer, random_layer};

use super::layers::{forward, kernels, nmse, plain, reported, rows, runner, shared, truth};

/// The refusal of an input, for an output of `outputs` elements.
fn refusal(runner: &mut MoeRunner, input: &ForwardInput<'_>, outputs: usize) -> String {
    let mut out = vec![0.0; outputs];
    match runner.forward(input, RowsMut::F32(&mut out)) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    }
}

fn layer(change: impl Fn(&mut LayerSpec)) -> LoadedLayer {
    let mut spec = plain();
    change(&mut spec);
    random_layer(&spec, FloatType::F32, 7).unwrap()
}

#[test]
fn hidden_states_that_are_no_numbers() {
    let layer = layer(|s| s.shared = Some(shared()));
    let good = rows(F32, 3, 48, 1);
    for kernel in kernels() {
        let mut runner = runner(&layer, Some(kernel), F32);
        let want = forward(&mut runner, &good);
        for (bad, says) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")]
        {
            let mut hidden = good.clone();
            hidden[2 * 48 + 17] = bad;
            let error = refusal(&mut runner, &ForwardInput::new(Rows::F32(&hidden)), 144);
            assert_eq!(
                error,
                format!("hidden_states: row 2, column 17: {says} is not a finite number")
            );
        }
        assert_eq!(forward(&mut runner, &good), want, "{kernel}");
    }
}

/// A number is looked at as the layer's dtype has it: f32 rows may hold what is too large for that.
#[test]
fn hidden_states_beyond_the_layers_dtype() {
    let layer = layer(|_| {});
    let mut hidden = rows(F32, 3, 48, 1);
    for (dtype, beyond) in [(F16, 65_520.0), (Bf16, f32::MAX)] {
        hidden[48 + 5] = beyond;
        let mut runner = runner(&layer, None, dtype);
        let error = refusal(&mut runner, &ForwardInput::new(Rows::F32(&hidden)), 144);
        assert_eq!(error, "hidden_states: row 1, column 5: inf is not a finite number");
    }
    // the last that f16 does not round to infinity
    hidden[48 + 5] = 65_519.0;
    forward(&mut runner(&layer, None, F16), &hidden);
}

#[test]
fn rows_of_zeros_are_rows() {
    let layer = layer(|s| s.shared = Some(shared()));
    let y = forward(&mut runner(&layer, None, F32), &[0.0; 96]);
    assert_eq!(y, [0.0; 96]);
}

#[test]
fn lengths_that_do_not_fit() {
    let mut hash =
        runner(&layer(|s| s.router.selection = Selection::HashTable { vocabulary: 10 }), None, F32);
    let mut runner = runner(&layer(|_| {}), None, F32);
    let hidden = rows(F32, 3, 48, 1);
    let input = ForwardInput::new(Rows::F32(&hidden));
    let ids = [LogicalId(0); 6];
    let far = [LogicalId(0), LogicalId(1), LogicalId(2), LogicalId(8), LogicalId(0), LogicalId(0)];
    let short = ForwardInput::new(Rows::F32(&hidden[1..]));
    for (input, outputs, says) in [
        (short, 143, "hidden_states: 143 elements are not whole rows of 48"),
        (input, 143, "output: 143 elements, 144 are needed"),
        (
            ForwardInput { router_logits: Some(&hidden[..23]), ..input },
            144,
            "router_logits: 23 elements, 24 are needed",
        ),
        (
            ForwardInput { input_ids: Some(&[1, 2]), ..input },
            144,
            "input_ids: 2 elements, 3 are needed",
        ),
        (
            ForwardInput { expert_ids: Some(&ids[..5]), ..input },
            144,
            "expert ids: 5 ids for 3 tokens of top-k 2",
        ),
        (
            ForwardInput { expert_ids: Some(&far), ..input },
            144,
            "expert ids: token 1: expert 8 of 8",
        ),
        (ForwardInput { router_logits: Some(&[f32::NAN; 24]), ..input }, 144, "token 0"),
    ] {
        let error = refusal(&mut runner, &input, outputs);
        assert!(error.contains(says), "{error}");
    }
    let with_ids = |ids| ForwardInput { input_ids: Some(ids), ..input };
    let error = refusal(&mut hash, &input, 144);
    assert!(error.contains("input ids") && error.contains("pass the ids of the tokens"), "{error}");
    let error = refusal(&mut hash, &with_ids(&[0, 10, 3]), 144);
    assert!(error.contains("token 1: id 10 is outside the vocabulary of 10"), "{error}");
    let mut out = vec![0.0; 144];
    hash.forward(&with_ids(&[0, 9, 3]), RowsMut::F32(&mut out)).unwrap();
}

/// Rows with gaps between them give the bits of rows without; nothing is written into the gaps.
#[test]
fn rows_with_gaps() {
    let layer = layer(|s| s.shared = Some(shared()));
    for dtype in [F32, Bf16] {
        let mut runner = runner(&layer, None, dtype);
        for tokens in [1, 3, 70] {
            let hidden = rows(dtype, tokens, 48, 6);
            let mut want = vec![0.0; hidden.len()];
            runner
                .forward(&ForwardInput::new(Rows::F32(&hidden)), RowsMut::F32(&mut want))
                .unwrap();
            // the last row has no gap behind it
            let mut apart = vec![f32::NAN; (tokens - 1) * 50 + 48];
            for (row, values) in hidden.chunks(48).enumerate() {
                apart[row * 50..][..48].copy_from_slice(values);
            }
            let input = ForwardInput::new(Rows::F32(&apart).strided([tokens, 48], 50).unwrap());
            let mut y = vec![7.0; tokens * 64];
            runner
                .forward(&input, RowsMut::F32(&mut y).strided([tokens, 48], 64).unwrap())
                .unwrap();
            for (row, want) in y.chunks(64).zip(want.chunks(48)) {
                assert_eq!(row[..48], *want, "{dtype:?}, {tokens} tokens");
                assert_eq!(row[48..], [7.0; 16], "{dtype:?}, {tokens} tokens");
            }
            let narrow: Vec<bf16> = apart.iter().map(|v| bf16::from_f32(*v)).collect();
            if dtype == Bf16 {
                let input =
                    ForwardInput::new(Rows::Bf16(&narrow).strided([tokens, 48], 50).unwrap());
                let mut y = vec![0.0; tokens * 48];
                runner.forward(&input, RowsMut::F32(&mut y)).unwrap();
                assert_eq!(y, want, "{tokens} tokens");
            }
        }
        let hidden = rows(dtype, 3, 48, 6);
        for (rows, cols, stride) in [(3, 48, 47), (3, 48, 49), (3, 0, 48), (usize::MAX, 48, 48)] {
            assert!(Rows::F32(&hidden).strided([rows, cols], stride).is_err());
        }
        let narrow = Rows::F32(&hidden).strided([3, 40], 48).unwrap();
        let error = refusal(&mut runner, &ForwardInput::new(narrow), 144);
        assert_eq!(error, "hidden_states: rows of 40 columns, 48 are needed");
    }
}

/// A layer on the processor reads no memory of a GPU.
#[test]
fn rows_of_a_gpu_are_for_layers_on_it() {
    let mut runner = runner(&layer(|_| {}), None, Bf16);
    // SAFETY: nothing on a GPU reads them.
    let rows = unsafe { DeviceRows::new(1 << 40, Bf16, [3, 48], 48) }.unwrap();
    let error = refusal(&mut runner, &ForwardInput::new(Rows::Device(rows)), 144);
    assert!(error.starts_with("hidden_states: the rows lie on a GPU, 'cpu_"), "{error}");
    for (pointer, shape, stride) in [(1, [3, 48], 48), (2, [3, 48], 47), (2, [usize::MAX, 2], 2)] {
        // SAFETY: as above.
        assert!(unsafe { DeviceRows::new(pointer, Bf16, shape, stride) }.is_err());
    }
}

#[test]
fn dtypes_other_than_the_layers() {
    let layer = layer(|_| {});
    let (wide, narrow) = ([f16::ONE; 48], [bf16::ONE; 48]);
    let mut runner = runner(&layer, None, Bf16);
    let mut out = [bf16::ZERO; 48];
    let error = runner.forward(&ForwardInput::new(Rows::F16(&wide)), RowsMut::Bf16(&mut out));
    assert_eq!(
        error.unwrap_err().to_string(),
        "hidden_states: f16 rows for a layer made ready for bf16"
    );
    let mut half = [f16::ZERO; 48];
    let error = runner.forward(&ForwardInput::new(Rows::Bf16(&narrow)), RowsMut::F16(&mut half));
    let error = error.unwrap_err().to_string();
    assert!(error.starts_with("output: f16"), "{error}");
    runner.forward(&ForwardInput::new(Rows::Bf16(&narrow)), RowsMut::Bf16(&mut out)).unwrap();
}

/// Without a gate the caller brings the logits; with one, given logits replace its own.
#[test]
fn logits_from_the_caller() {
    let whole = layer(|_| {});
    let hidden = rows(F32, 3, 48, 1);
    let input = ForwardInput::new(Rows::F32(&hidden));
    let without = LoadedLayer { gate: None, ..whole.clone() };
    let logits = rows(F32, 3, 8, 5);
    let truth = reference::layer(&without, &hidden, Some(&logits), None).unwrap().output;
    for kernel in kernels() {
        let mut runner_without = runner(&without, Some(kernel), F32);
        assert!(!runner_without.is_internal_router());
        let error = refusal(&mut runner_without, &input, 144);
        assert_eq!(
            error,
            "router_logits: the layer has no gate; logits, or a finished routing, must be given"
        );
        let mut with = runner(&whole, Some(kernel), F32);
        assert!(with.is_internal_router());
        for runner in [&mut runner_without, &mut with] {
            let mut y = vec![f32::NAN; 144];
            let given = ForwardInput { router_logits: Some(&logits), ..input };
            let (_, report) = reported(runner, &given, &mut y);
            assert_eq!(report.router_logits, logits);
            assert!(nmse(&y, &truth) <= 1e-11, "{kernel}");
        }
    }
}

/// The caller has applied the input transform, and gives the rows before it apart.
#[test]
fn shared_input_from_the_caller() {
    let layer = layer(|s| {
        s.dims.routed_hidden = 24;
        s.input_transform = Transform { steps: vec![TransformStep::Linear { width: 24 }] };
        s.output_transform = Transform { steps: vec![TransformStep::Linear { width: 48 }] };
        s.shared = Some(shared());
    });
    let hidden = rows(F32, 3, 48, 1);
    let moe_runner::weights::StepWeights::Linear(matrix) = &layer.input_transform[0] else {
        panic!("a linear step")
    };
    let rows: Vec<Vec<f64>> =
        hidden.chunks(48).map(|row| row.iter().map(|v| f64::from(*v)).collect()).collect();
    let latent: Vec<f32> = moe_runner::experts::reference::project(matrix, None, &rows)
        .concat()
        .into_iter()
        .map(|v| v as f32)
        .collect();
    let truth = truth(&layer, &hidden);
    let given = ForwardInput {
        shared_input: Some(Rows::F32(&hidden)),
        ..ForwardInput::new(Rows::F32(&latent))
    };
    for kernel in kernels() {
        let mut runner = runner(&layer, Some(kernel), F32);
        for _ in 0..3 {
            // a pass of the other kind in between: their buffers are not mixed up
            let mut y = vec![f32::NAN; 144];
            runner.forward(&given, RowsMut::F32(&mut y)).unwrap();
            let error = nmse(&y, &truth);
            assert!(error <= 1e-11, "{kernel}: NMSE {error:e}");
            assert!(nmse(&forward(&mut runner, &hidden), &truth) <= 1e-11, "{kernel}");
        }
        let short = ForwardInput { shared_input: Some(Rows::F32(&hidden[48..])), ..given };
        let error = refusal(&mut runner, &short, 144);
        assert_eq!(error, "shared_input: 96 elements, 144 are needed");
        let mut bad = hidden.clone();
        bad[50] = f32::NAN;
        let bad = ForwardInput { shared_input: Some(Rows::F32(&bad)), ..given };
        let error = refusal(&mut runner, &bad, 144);
        assert_eq!(error, "shared_input: row 1, column 2: NaN is not a finite number");
        let wide = ForwardInput { hidden: Rows::F32(&hidden[..95]), ..given };
        let error = refusal(&mut runner, &wide, 144);
        assert_eq!(error, "hidden_states: 95 elements are not whole rows of 24");
        let f16 = [f16::ONE; 144];
        let other = ForwardInput { shared_input: Some(Rows::F16(&f16)), ..given };
        let error = refusal(&mut runner, &other, 144);
        assert_eq!(error, "shared_input: f16 rows for a layer made ready for f32");
    }
}
