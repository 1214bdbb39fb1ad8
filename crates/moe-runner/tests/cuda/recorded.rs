//! Published layouts with recorded inputs, routing and outputs: the bounds are those of the processor's
//! kernels.

use moe_runner::Error;
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::hidden::{Rows, RowsMut};
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, Report};

use crate::cases::{TOKENS, all_cases};
use crate::gpu;
use crate::layers::nmse;

#[test]
fn every_recorded_layer_is_reproduced() {
    let _alone = crate::alone();
    let Some(options) = gpu(F32) else { return };
    let (mut done, mut refused) = (0, Vec::new());
    for case in all_cases() {
        for (entry, layer) in case.layers() {
            let ready = match layer.ready(&options) {
                Ok(ready) => ready,
                // rows as NVFP4 and MX codes are for emulation, on the processor; never for another kernel
                Err(Error::NoKernel(reason)) => {
                    assert!(reason.contains("does not take activations as nvfp4"), "{reason}");
                    refused.push(case.name.clone());
                    continue;
                }
                Err(error) => panic!("{}: {error}", case.name),
            };
            let mut runner = MoeRunner::new(ready);
            for tokens in TOKENS {
                let recorded = case.recorded(entry.spec.index, tokens);
                let mut y = vec![f32::NAN; recorded.x.len()];
                let mut report = Report::default();
                let input = ForwardInput::new(Rows::F32(&recorded.x));
                let out = runner
                    .forward_reporting(&input, RowsMut::F32(&mut y), Some(&mut report))
                    .unwrap_or_else(|error| panic!("{}: {error}", case.name));
                let place = format!("{} {} T={tokens}", case.name, entry.spec.name);
                recorded.expect_routing(&place, &entry.spec, &report.routing);
                if let (Some(shared), Some(want)) = (&report.shared, &recorded.shared_out)
                    && !recorded.fake_quantised
                {
                    let error = nmse(shared, want);
                    assert!(error <= 1e-10, "{place}: shared output, NMSE {error:e}");
                }
                y.iter_mut().for_each(|v| *v *= out.output_scale);
                let error = nmse(&y, &recorded.out);
                assert!(error <= recorded.bound(), "{place}: NMSE {error:e}");
                done += 1;
            }
        }
    }
    println!("{done} recordings reproduced; refused: {refused:?}");
    assert!(done > 100 && refused.len() <= 2, "{done}, {refused:?}");
}

#[test]
fn sixteen_bit_cases_hold_their_bounds_in_their_own_dtype() {
    let _alone = crate::alone();
    if gpu(F32).is_none() {
        return;
    }
    let mut tested = 0;
    for case in all_cases() {
        let Some(limit) = case.sixteen_bit_bound() else { continue };
        let dtype = case.dtype();
        let Some(options) = gpu(dtype) else { return };
        for (entry, layer) in case.layers() {
            let Ok(ready) = layer.ready(&options) else { continue };
            let mut runner = MoeRunner::new(ready);
            for tokens in TOKENS {
                let recorded = case.recorded(entry.spec.index, tokens);
                if recorded.fake_quantised {
                    continue;
                }
                let mut y = vec![f32::NAN; recorded.x.len()];
                let out = runner
                    .forward(&ForwardInput::new(Rows::F32(&recorded.x)), RowsMut::F32(&mut y))
                    .unwrap();
                let scale = out.output_scale;
                y.iter_mut().for_each(|v| *v = dtype.round(*v) * scale);
                let error = nmse(&y, &recorded.out);
                assert!(error <= limit, "{} {tokens}: NMSE {error:e}", case.name);
                tested += 1;
            }
        }
    }
    assert!(tested > 0, "no 16-bit case was found");
}
