//! Ways in which rows and routing come from the host, against the same on the processor; what bad ones
//! are told.

use half::{bf16, f16};
use moe_runner::hidden::ActivationDtype::{Bf16, F16, F32};
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::router::LogicalId;
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, NonFinite, Options};
use moe_runner::spec::{Transform, TransformStep};
use moe_runner::weights::{FloatType, LoadedLayer, random_layer};

use crate::layers::{forward, nmse, plain, rows, shared};
use crate::{gpu, runner};

fn layer() -> LoadedLayer {
    let mut spec = plain();
    spec.shared = Some(shared());
    random_layer(&spec, FloatType::F32, 7).unwrap()
}

fn output(runner: &mut MoeRunner, input: &ForwardInput<'_>, len: usize) -> Vec<f32> {
    let mut y = vec![f32::NAN; len];
    runner.forward(input, RowsMut::F32(&mut y)).unwrap_or_else(|error| panic!("{error}"));
    y
}

fn refusal(runner: &mut MoeRunner, input: &ForwardInput<'_>, len: usize) -> String {
    let mut y = vec![0.0; len];
    runner.forward(input, RowsMut::F32(&mut y)).unwrap_err().to_string()
}

#[test]
fn logits_ids_and_finished_routing() {
    let _alone = crate::alone();
    let Some(options) = gpu(F32) else { return };
    let layer = layer();
    let (mut ours, mut host) =
        (runner(&layer, &options), crate::layers::runner(&layer, Some("cpu_portable"), F32));
    let hidden = rows(F32, 5, 48, 2);
    let plain = ForwardInput::new(Rows::F32(&hidden));
    let logits = rows(F32, 5, 8, 3);
    let ids: Vec<LogicalId> = [0, 7, 3, 2, 5, 6, 1, 0, 4, 3].map(LogicalId).into();
    let finished = [0, 7, -1, 2, 5, 9, 1, 0, 4, i32::MIN, 3, 3, 2, -7, 6];
    let weights: Vec<f32> = (0..15).map(|i| 0.1 * i as f32 - 0.3).collect();
    for input in [
        ForwardInput { router_logits: Some(&logits), ..plain },
        ForwardInput { router_logits: Some(&logits), expert_ids: Some(&ids), ..plain },
        ForwardInput { expert_ids: Some(&ids), ..plain },
        ForwardInput::routed(Rows::F32(&hidden), &finished[..10], &weights[..10]),
        ForwardInput::routed(Rows::F32(&hidden), &finished, &weights),
    ] {
        let want = output(&mut host, &input, hidden.len());
        let want: Vec<f64> = want.into_iter().map(f64::from).collect();
        let error = nmse(&output(&mut ours, &input, hidden.len()), &want);
        assert!(error <= 1e-11, "{input:?}: NMSE {error:e}");
    }
    let far = [LogicalId(8); 10];
    let input = ForwardInput { expert_ids: Some(&far), ..plain };
    assert!(refusal(&mut ours, &input, 240).contains("expert ids: token 0: expert 8 of 8"));
}

#[test]
fn rows_that_the_caller_has_transformed() {
    let _alone = crate::alone();
    let Some(options) = gpu(F32) else { return };
    let mut spec = plain();
    spec.shared = Some(shared());
    spec.dims.routed_hidden = 24;
    spec.input_transform = Transform { steps: vec![TransformStep::Linear { width: 24 }] };
    spec.output_transform = Transform { steps: vec![TransformStep::Linear { width: 48 }] };
    let layer = random_layer(&spec, FloatType::F32, 3).unwrap();
    let (hidden, transformed) = (rows(F32, 6, 48, 1), rows(F32, 6, 24, 2));
    let input = ForwardInput {
        shared_input: Some(Rows::F32(&hidden)),
        ..ForwardInput::new(Rows::F32(&transformed))
    };
    let mut host = crate::layers::runner(&layer, Some("cpu_portable"), F32);
    let want: Vec<f64> = output(&mut host, &input, 288).into_iter().map(f64::from).collect();
    assert!(nmse(&output(&mut runner(&layer, &options), &input, 288), &want) <= 1e-11);
}

/// 16-bit rows give the bits of the same numbers in f32; rows with gaps those of rows without.
#[test]
fn rows_of_every_dtype_with_and_without_gaps() {
    let _alone = crate::alone();
    for dtype in [Bf16, F16] {
        let Some(options) = gpu(dtype) else { return };
        let layer = layer();
        let mut runner = runner(&layer, &options);
        let hidden = rows(dtype, 6, 48, 4);
        let want = output(&mut runner, &ForwardInput::new(Rows::F32(&hidden)), 288);
        let (mut as_f16, mut as_bf16) = ([f16::ZERO; 288], [bf16::ZERO; 288]);
        let narrow: Vec<f32> = match dtype {
            Bf16 => {
                let rows: Vec<bf16> = hidden.iter().map(|v| bf16::from_f32(*v)).collect();
                let input = ForwardInput::new(Rows::Bf16(&rows));
                runner.forward(&input, RowsMut::Bf16(&mut as_bf16)).unwrap();
                as_bf16.map(bf16::to_f32).into()
            }
            _ => {
                let rows: Vec<f16> = hidden.iter().map(|v| f16::from_f32(*v)).collect();
                let input = ForwardInput::new(Rows::F16(&rows));
                runner.forward(&input, RowsMut::F16(&mut as_f16)).unwrap();
                as_f16.map(f16::to_f32).into()
            }
        };
        let rounded: Vec<f32> = want.iter().map(|v| dtype.round(*v)).collect();
        assert_eq!(narrow, rounded, "{dtype:?}");
        let mut apart = vec![f32::NAN; 5 * 50 + 48];
        for (row, values) in hidden.chunks(48).enumerate() {
            apart[row * 50..][..48].copy_from_slice(values);
        }
        let input = ForwardInput::new(Rows::F32(&apart).strided([6, 48], 50).unwrap());
        let mut y = vec![7.0; 6 * 64];
        let out = RowsMut::F32(&mut y).strided([6, 48], 64).unwrap();
        runner.forward(&input, out).unwrap();
        for (row, want) in y.chunks(64).zip(want.chunks(48)) {
            assert_eq!(row[..48], *want, "{dtype:?}");
            assert_eq!(row[48..], [7.0; 16], "{dtype:?}");
        }
    }
}

#[test]
fn rows_that_are_no_numbers() {
    let _alone = crate::alone();
    let Some(options) = gpu(F32) else { return };
    let layer = layer();
    let mut strict = runner(&layer, &options);
    let good = rows(F32, 3, 48, 1);
    let want = forward(&mut strict, &good);
    let through = Options { non_finite: NonFinite::LetThrough, ..options.clone() };
    let mut through = runner(&layer, &through);
    for (bad, says) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let mut hidden = good.clone();
        hidden[2 * 48 + 17] = bad;
        let error = refusal(&mut strict, &ForwardInput::new(Rows::F32(&hidden)), 144);
        assert_eq!(
            error,
            format!("hidden_states: row 2, column 17: {says} is not a finite number")
        );
        // the next pass is as if nothing had been
        assert_eq!(forward(&mut strict, &good), want);
        assert_eq!(forward(&mut through, &hidden)[..96], want[..96]);
    }
    let logits = [f32::NAN; 24];
    let input =
        ForwardInput { router_logits: Some(&logits), ..ForwardInput::new(Rows::F32(&good)) };
    let error = refusal(&mut strict, &input, 144);
    assert!(error.starts_with("router logits: token "), "{error}");
    assert_eq!(forward(&mut strict, &good), want);
}
