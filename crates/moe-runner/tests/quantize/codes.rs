//! Every format against a model of it that is written here: the scale by its rule in float64, and
//! the nearest of all values of the format, found by looking at each.

use std::collections::BTreeMap;

use moe_runner::quantize::{Format, Role};

use super::{FORMATS, float_cases, large_case, load, options, projections, values, write};

/// All values of a float format without infinities, in the order of their magnitude codes: ties go
/// to the even code.
fn magnitudes(exponent_bits: u32, mantissa_bits: u32, bias: i32, codes: usize) -> Vec<f64> {
    (0..codes)
        .map(|code| {
            let exponent = (code >> mantissa_bits) as i32 & ((1 << exponent_bits) - 1);
            let fraction =
                (code & ((1 << mantissa_bits) - 1)) as f64 / f64::from(1 << mantissa_bits);
            match exponent {
                0 => fraction * 2f64.powi(1 - bias),
                _ => (1.0 + fraction) * 2f64.powi(exponent - bias),
            }
        })
        .collect()
}

/// The nearest of `magnitudes`, with the sign of `x`; the even code of two that are as near.
fn nearest(x: f64, magnitudes: &[f64]) -> f64 {
    let mut best = 0;
    for (code, value) in magnitudes.iter().enumerate() {
        let (new, old) = ((x.abs() - value).abs(), (x.abs() - magnitudes[best]).abs());
        if new < old || new == old && code % 2 == 0 {
            best = code;
        }
    }
    magnitudes[best].copysign(x)
}

fn e4m3() -> Vec<f64> {
    magnitudes(4, 3, 7, 127)
}

fn e2m1() -> Vec<f64> {
    magnitudes(2, 1, 1, 8)
}

fn largest(values: impl IntoIterator<Item = f32>) -> f64 {
    values.into_iter().fold(0.0, |max, value| max.max(f64::from(value).abs()))
}

/// A scale as f32 arithmetic gives it; 1 for zeros.
fn scale(amax: f64, by: f32) -> f64 {
    let scale = amax as f32 / by;
    if scale == 0.0 { 1.0 } else { f64::from(scale) }
}

/// Values `[rows, cols]`, quantised and back. `shared` is the largest magnitude of all that share a
/// tensor's scale.
fn model(format: Format, values: &[f32], cols: usize, shared: f64, dtype: &str) -> Vec<f64> {
    let rows = values.len() / cols;
    let (down, across) = match format {
        Format::Fp8 | Format::Int8 => (1, cols),
        Format::Fp8Block => (128, 128),
        Format::W4a16 { group } => (1, group),
        Format::Nvfp4a16 => (1, 16),
        Format::Mxfp4 => (1, 32),
    };
    let (e4m3, e2m1) = (e4m3(), e2m1());
    let mut out = vec![0.0; values.len()];
    for first_row in (0..rows).step_by(down) {
        for first_col in (0..cols).step_by(across) {
            let places: Vec<usize> = (first_row..rows.min(first_row + down))
                .flat_map(|row| {
                    (first_col..cols.min(first_col + across)).map(move |col| row * cols + col)
                })
                .collect();
            let amax = largest(places.iter().map(|place| values[*place]));
            for place in places {
                let x = values[place];
                // codes come of f32 divisions: the quotient is rounded before it is rounded again
                let quotient = |scale: f64| f64::from(x / scale as f32);
                out[place] = match format {
                    Format::Fp8 | Format::Fp8Block => {
                        let scale = scale(amax, 448.0);
                        nearest(quotient(scale), &e4m3) * scale
                    }
                    Format::Int8 => {
                        let scale = scale(amax, 127.5);
                        quotient(scale).round_ties_even().clamp(-128.0, 127.0) * scale
                    }
                    Format::W4a16 { .. } => {
                        let scale = match (dtype, scale(amax, 7.5) as f32) {
                            ("float16", s) => half::f16::from_f32(s).to_f32(),
                            ("bfloat16", s) => half::bf16::from_f32(s).to_f32(),
                            (_, s) => s,
                        };
                        let scale = f64::from(scale);
                        quotient(scale).round_ties_even().clamp(-8.0, 7.0) * scale
                    }
                    Format::Nvfp4a16 => {
                        let global = (448.0 * 6.0) / shared as f32;
                        let block = nearest(f64::from(global * amax as f32 / 6.0), &e4m3);
                        let up = f64::from(x * global / block as f32);
                        let code = if block == 0.0 { 0.0 } else { nearest(up, &e2m1) };
                        code * block / f64::from(global)
                    }
                    Format::Mxfp4 => {
                        // a mantissa from 1.75 on rounds up to the next power of two
                        let exponent = amax.log2().floor();
                        let up = amax / exponent.exp2() >= 1.75;
                        let scale = (exponent + f64::from(u8::from(up)) - 2.0).exp2();
                        nearest(f64::from(x) / scale, &e2m1) * scale
                    }
                };
            }
        }
    }
    out
}

/// Sums for the errors of one layer and projection.
#[derive(Default)]
struct Sums {
    changed: f64,
    weights: f64,
    max_relative: f64,
    modules: usize,
}

fn fits(format: Format, cols: usize) -> bool {
    match format {
        Format::W4a16 { group } => cols.is_multiple_of(group),
        Format::Nvfp4a16 => cols.is_multiple_of(16),
        Format::Mxfp4 => cols.is_multiple_of(32),
        _ => true,
    }
}

fn role(shared: bool, name: &str) -> Role {
    match (shared, name) {
        (false, "gate") => Role::Gate,
        (false, "up") => Role::Up,
        (false, _) => Role::Down,
        (true, "gate") => Role::SharedGate,
        (true, "up") => Role::SharedUp,
        (true, _) => Role::SharedDown,
    }
}

#[test]
fn every_case_in_every_format_is_the_model_and_so_are_its_errors() {
    let mut compared = BTreeMap::new();
    let large = large_case();
    let mut cases = float_cases();
    cases.push(large.path().to_owned());
    for case in cases {
        let originals = load(&case);
        let config = std::fs::read_to_string(case.join("config.json")).unwrap();
        let dtype = ["float16", "bfloat16", "float32"]
            .into_iter()
            .find(|dtype| config.contains(&format!("\"{dtype}\"")))
            .unwrap();
        for format in FORMATS.into_iter().chain([Format::W4a16 { group: 128 }]) {
            let folder = tempfile::tempdir().unwrap();
            let place = format!("{}, {}", case.display(), format.name());
            let summary = match write(&case, folder.path(), &options(format)) {
                Ok(summary) => summary,
                Err(error) => {
                    let error = error.to_string();
                    let stack = error.contains("as a stack with biases");
                    let size = error.contains("do not divide")
                        && originals.iter().any(|(_, layer)| {
                            let shared = layer.shared.iter().flat_map(|shared| &shared.experts);
                            layer
                                .experts
                                .iter()
                                .chain(shared)
                                .flat_map(projections)
                                .any(|(_, matrix)| !fits(format, matrix.cols()))
                        });
                    assert!(stack || size, "{place}: {error}");
                    continue;
                }
            };
            let mut sums = BTreeMap::<(usize, Role), Sums>::new();
            for ((entry, old), (_, new)) in originals.iter().zip(&load(&folder.path().join("out")))
            {
                let experts = |layer: &moe_runner::weights::LoadedLayer| {
                    let shared = layer.shared.iter().flat_map(|shared| shared.experts.clone());
                    let routed = layer.experts.iter().cloned().map(|expert| (false, expert));
                    routed.chain(shared.map(|expert| (true, expert))).collect::<Vec<_>>()
                };
                for ((shared, old), (_, new)) in experts(old).iter().zip(&experts(new)) {
                    let largest_of = |names: &[&str]| {
                        let alike = projections(old).into_iter();
                        let alike = alike.filter(|(name, _)| names.contains(name));
                        largest(alike.flat_map(|(_, matrix)| values(matrix)))
                    };
                    for ((name, old), (_, new)) in projections(old).iter().zip(projections(new)) {
                        let tied = if *name == "down" {
                            largest_of(&["down"])
                        } else {
                            largest_of(&["gate", "up"])
                        };
                        let weights = values(old);
                        let wanted = model(format, &weights, old.cols(), tied, dtype);
                        let got = values(new);
                        let sums = sums.entry((entry.spec.index, role(*shared, name))).or_default();
                        sums.modules += 1;
                        let amax = largest(weights.iter().copied());
                        let mut worst = 0f64;
                        for (i, (wanted, got)) in wanted.iter().zip(&got).enumerate() {
                            let close = (wanted - f64::from(*got)).abs() <= 1e-6 * wanted.abs();
                            assert!(
                                close,
                                "{place}, {name}, element {i} of {}: {got}, should be {wanted}",
                                weights[i]
                            );
                            let change = f64::from(*got) - f64::from(weights[i]);
                            sums.changed += change * change;
                            sums.weights += f64::from(weights[i]).powi(2);
                            worst = worst.max(change.abs());
                        }
                        sums.max_relative = sums.max_relative.max(worst / amax);
                    }
                }
            }
            assert_eq!(summary.errors.len(), sums.len(), "{place}");
            for error in &summary.errors {
                let sums = &sums[&(error.layer, error.role)];
                assert_eq!(error.modules, sums.modules, "{place}");
                let nmse = sums.changed / sums.weights;
                assert!(nmse > 0.0 && (error.nmse / nmse - 1.0).abs() < 1e-9, "{place}: {error:?}");
                let relative = error.max_relative / sums.max_relative;
                assert!((relative - 1.0).abs() < 1e-9, "{place}: {error:?}");
            }
            *compared.entry(format!("{format:?}")).or_insert(0) += 1;
        }
    }
    println!("{compared:?}");
    // all of them in the case whose sizes fit, most of them in most cases
    assert_eq!(compared.len(), FORMATS.len() + 1, "{compared:?}");
    assert!(compared["Fp8"] >= 6, "{compared:?}");
}
