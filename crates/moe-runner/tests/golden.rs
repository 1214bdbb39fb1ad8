//! Published layouts with recorded inputs, routing and outputs: every case, layer and token count,
//! through every kernel, on one rank and split over many.
//!
//! The repository carries one case for each architecture and format. Where the full set stands
//! beside the repository, all of it runs.

mod cases;
mod layers;

use cases::{Case, TOKENS, all_cases};
use layers::{nmse, options, split, splits};
use moe_runner::experts::KERNELS;
use moe_runner::hidden::{ActivationDtype, Rows, RowsMut};
use moe_runner::runner::{ForwardInput, MoeRunner, MoeRunnerInterface, Report};
use moe_runner::{Error, oracle};

#[test]
fn every_recorded_layer_is_reproduced_by_every_kernel() {
    let features = oracle::Machine::detect().features;
    for case in all_cases() {
        for (entry, layer) in case.layers() {
            for kernel in
                KERNELS.iter().filter(|kernel| features.contains(kernel.target.features()))
            {
                let ready = match layer.ready(&options(Some(kernel.name), ActivationDtype::F32)) {
                    Ok(ready) => ready,
                    Err(Error::NoKernel(_)) => continue,
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
                    let place =
                        format!("{} {} {} T={tokens}", case.name, entry.spec.name, kernel.name);
                    recorded.expect_routing(&place, &entry.spec, &report.routing);
                    if let (Some(shared), Some(want)) = (&report.shared, &recorded.shared_out)
                        && !recorded.fake_quantised
                    {
                        let error = nmse(shared, want);
                        assert!(error <= 1e-10, "{place}: shared output, NMSE {error:e}");
                    }
                    let scale = out.output_scale;
                    y.iter_mut().for_each(|v| *v *= scale);
                    let error = nmse(&y, &recorded.out);
                    assert!(error <= recorded.bound(), "{place}: NMSE {error:e}");
                }
            }
        }
    }
}

#[test]
fn sixteen_bit_cases_hold_their_bounds_in_their_own_dtype() {
    let mut tested = 0;
    for case in all_cases() {
        let Some(limit) = case.sixteen_bit_bound() else { continue };
        let dtype = case.dtype();
        for (entry, layer) in case.layers() {
            let mut runner = MoeRunner::new(layer.ready(&options(None, dtype)).unwrap());
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

/// The same layers over threads of this process, in every way of splitting that is promised.
#[test]
fn every_recorded_layer_is_reproduced_by_every_split() {
    let options = options(None, ActivationDtype::F32);
    for case in all_cases() {
        for (entry, layer) in case.layers() {
            for (name, parallel) in splits() {
                for tokens in TOKENS {
                    let recorded = case.recorded(entry.spec.index, tokens);
                    let place = format!("{} {} {name} T={tokens}", case.name, entry.spec.name);
                    let done = match split(&layer, &options, &parallel, &recorded.x) {
                        Ok(done) => done,
                        // refused with the reason and the way out, never computed wrongly
                        Err(Error::Spec { reason, .. })
                            if reason.contains("expert parallelism") =>
                        {
                            continue;
                        }
                        Err(error) => panic!("{place}: {error}"),
                    };
                    let error = nmse(&done.output, &recorded.out);
                    assert!(error <= recorded.bound(), "{place}: NMSE {error:e}");
                    if let (Some(shared), Some(want)) = (&done.shared, &recorded.shared_out)
                        && !recorded.fake_quantised
                    {
                        let error = nmse(shared, want);
                        assert!(error <= 1e-10, "{place}: shared output, NMSE {error:e}");
                    }
                }
            }
        }
    }
}

/// A case that cannot be read would otherwise be a case that is not tested.
#[test]
fn cases_are_found() {
    let names: Vec<String> = all_cases().iter().map(|case: &Case| case.name.clone()).collect();
    for wanted in ["gpt_oss", "longcat_flash", "phimoe", "qwen2_moe"] {
        assert!(names.iter().any(|name| name.starts_with(wanted)), "{wanted} is not in {names:?}");
    }
}
