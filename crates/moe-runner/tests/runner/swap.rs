//! A replaced quant method gives what a fresh runner gives, and one that does not fit is refused.

use std::sync::Arc;

use moe_runner::Error;
use moe_runner::exchange::{Completeness, ExpertMap, LocalExchange};
use moe_runner::experts::{BuiltKernel, Caps, ExpertSet, build};
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::router::LogicalId;
use moe_runner::runner::{MoeRunnerInterface, QuantMethod};
use moe_runner::spec::{Dims, RouterSpec};
use moe_runner::weights::{FloatType, random_layer};

use super::doubles::desc;
use super::layers::{forward, kernels, nmse, options, plain, rows, runner, truth, variants};

/// Every kernel after every other one, on every option: the bits of a fresh runner. Shared
/// experts go with the routed ones.
#[test]
fn a_swapped_kernel_gives_what_a_fresh_one_gives() {
    for (name, spec) in variants() {
        let layer = random_layer(&spec, FloatType::F32, 7).unwrap();
        let hidden = rows(F32, 5, 48, 3);
        let truth = truth(&layer, &hidden);
        let options = options(None, F32);
        let mut swapped = runner(&layer, None, F32);
        for kernel in kernels().into_iter().chain(kernels().into_iter().rev()) {
            let before = swapped.shared_experts().map(|shared| shared.kernel().name);
            let method = layer.quant_method(desc(kernel), &options).unwrap();
            let old = swapped.replace_quant_method(method).unwrap();
            assert_eq!(old.shared.as_ref().map(|shared| shared.desc().name), before);
            let beside = desc(kernel).dense.unwrap_or(desc(kernel)).name;
            assert!(swapped.shared_experts().is_none_or(|shared| shared.kernel().name == beside));
            assert_eq!(swapped.method().desc().name, kernel);
            assert_eq!(swapped.choice().kernel.name, kernel);
            let y = forward(&mut swapped, &hidden);
            let error = nmse(&y, &truth);
            assert!(error <= 1e-11, "{name}, {kernel}: NMSE {error:e}");
            let mut fresh = runner(&layer, Some(kernel), F32);
            assert_eq!(y, forward(&mut fresh, &hidden), "{name}, {kernel}");
        }
    }
}

#[test]
fn a_method_of_another_shape_is_refused_and_the_old_one_stays() {
    let layer = random_layer(&plain(), FloatType::F32, 7).unwrap();
    let hidden = rows(F32, 5, 48, 3);
    let mut runner = runner(&layer, None, F32);
    let before = forward(&mut runner, &hidden);

    let other = |experts, width| {
        let mut spec = plain();
        spec.router = RouterSpec::softmax(experts, 2, true);
        spec.dims = Dims { hidden: width, routed_hidden: width, intermediate: 40 };
        random_layer(&spec, FloatType::F32, 7).unwrap()
    };
    let local = |experts| Box::new(LocalExchange::new(experts));
    let ids: Vec<LogicalId> = (0..8).map(LogicalId).collect();
    let halves = Arc::new(ExpertMap::new(8, &[ids[..4].to_vec(), ids[4..].to_vec()]).unwrap());
    let half = || Box::new(LocalExchange::of(halves.clone(), 1, Completeness::Partial));
    let few = ExpertSet { experts: &layer.experts[..4], ..layer.expert_set() };
    let kernel = |name, set: ExpertSet<'_>| build(desc(name), set, F32).unwrap();

    for name in kernels() {
        let (wide, many) = (other(8, 64), other(9, 48));
        let mut cases: Vec<(BuiltKernel, Box<dyn moe_runner::exchange::Exchange>, &str)> = vec![
            (
                kernel(name, wide.expert_set()),
                local(8),
                "rows of 64 columns, the experts' rows have 48",
            ),
            (kernel(name, many.expert_set()), local(9), "knows 9 experts, the layer has 8"),
            (kernel(name, many.expert_set()), local(8), "holds 9 experts, it is to run 8"),
            (kernel(name, few), local(8), "holds 4 experts, it is to run 8"),
        ];
        if !desc(name).caps.has(Caps::ROUTES) {
            cases.push((kernel(name, layer.expert_set()), half(), "it is to run 4 of 8"));
        }
        for (kernel, exchange, says) in cases {
            let refused =
                runner.replace_quant_method(QuantMethod { kernel, exchange, shared: None });
            let Err(Error::Spec { layer, reason }) = refused else {
                panic!("{name}: not refused: {says}")
            };
            assert_eq!(layer, "model.layers.0.mlp");
            assert!(reason.contains(says), "{reason}");
            assert_eq!(forward(&mut runner, &hidden), before);
        }
    }
}

#[test]
fn shared_experts_of_another_layer_are_refused() {
    let options = options(None, F32);
    let (_, spec) = variants().into_iter().find(|(_, spec)| spec.shared.is_some()).unwrap();
    let with = random_layer(&spec, FloatType::F32, 7).unwrap();
    let without = random_layer(&plain(), FloatType::F32, 7).unwrap();
    let mut runner = runner(&without, None, F32);
    let method = QuantMethod {
        shared: with.quant_method(desc("reference"), &options).unwrap().shared,
        ..without.quant_method(desc("reference"), &options).unwrap()
    };
    let error = runner.replace_quant_method(method).unwrap_err().to_string();
    assert!(error.contains("the layer has 0 of 48"), "{error}");
}
