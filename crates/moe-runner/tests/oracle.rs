//! The oracle: whatever is asked of it, every kernel is accounted for, every reason is complete and
//! every fix is true; and what it says is what happens.

use std::path::Path;

use moe_runner::Error;
use moe_runner::checkpoint::{Checkpoint, architecture};
use moe_runner::experts::{
    self, Archs, Caps, Device, Extras, Formats, Functions, KERNELS, KernelDesc, ProductFormat,
    RowFormat, Scheme, Target,
};
use moe_runner::hidden::ActivationDtype::{self, Bf16, F16, F32};
use moe_runner::oracle::{Change, Machine, Request, failing_conditions, select};
use moe_runner::runner::Options;
use moe_runner::spec::{Activation, ActivationFormat, Granularity, WeightFormat, WeightOn};
use moe_runner::weights::{
    Element, LoadedLayer, Matrix, RandomFormat, RandomScaled, ScaleType, random_layer,
};
use proptest::prelude::*;
use proptest::sample::{select as one_of, subsequence};

/// A kernel that no build has, with every requirement that a description can state.
const CUDA: KernelDesc = KernelDesc {
    name: "made_up_cuda",
    target: Target::Cuda(Archs::AtLeast(100)),
    schemes: &[Scheme {
        weights: Formats::Only(&[WeightFormat::Nvfp4, WeightFormat::Mxfp4]),
        groups: Formats::Only(&[[1, 16], [1, 32]]),
        rows: Formats::Only(&[ActivationFormat::Nvfp4]),
        extras: Extras::NONE,
        itself: None,
    }],
    functions: Functions::Only(&[Activation::Silu]),
    dtypes: &[Bf16, F16],
    multiples: (128, 64),
    caps: Caps::ROUTES.with(Caps::CAPTURES),
    row_formats: &[RowFormat::Batched],
    ..experts::cpu::CPU_PORTABLE
};

/// One that asks for less.
const CUDA_ANY: KernelDesc = KernelDesc {
    name: "made_up_cuda_any",
    target: Target::Cuda(Archs::AtLeast(0)),
    row_formats: &[RowFormat::Standard],
    caps: Caps::CAPTURES,
    schemes: &[Scheme::ANY],
    functions: Functions::All,
    ..CUDA
};

/// One for a single architecture, which pairs its formats: FP8 with FP8 rows, and MXFP4 with rows
/// that it quantises by itself.
const CUDA_HOPPER: KernelDesc = KernelDesc {
    name: "made_up_cuda_sm90a",
    target: Target::Cuda(Archs::Exactly(&[90])),
    schemes: &[
        Scheme {
            weights: Formats::Only(&[WeightFormat::Fp8(Granularity::Channel)]),
            rows: Formats::Only(&[ActivationFormat::Fp8Token]),
            ..Scheme::ANY
        },
        Scheme {
            weights: Formats::Only(&[WeightFormat::Mxfp4]),
            groups: Formats::Only(&[[1, 32]]),
            rows: Formats::Only(&[ActivationFormat::Unquantised]),
            extras: Extras::NONE,
            itself: Some(ActivationFormat::Fp8Token),
        },
    ],
    ..CUDA_ANY
};

fn kernels() -> Vec<&'static KernelDesc> {
    [&CUDA, &CUDA_ANY, &CUDA_HOPPER].into_iter().chain(KERNELS.iter().copied()).collect()
}

const WEIGHTS: [WeightFormat; 7] = [
    WeightFormat::Bf16,
    WeightFormat::Fp8(Granularity::Channel),
    WeightFormat::Int8(Granularity::Channel),
    WeightFormat::Nvfp4,
    WeightFormat::Mxfp4,
    WeightFormat::Mxfp6E3m2,
    WeightFormat::Mxfp8,
];

const ACTIVATIONS: [ActivationFormat; 6] = [
    ActivationFormat::Unquantised,
    ActivationFormat::Fp8Token,
    ActivationFormat::Int8Token,
    ActivationFormat::Nvfp4,
    ActivationFormat::Mxfp4,
    ActivationFormat::Mxfp8,
];

fn requests() -> impl Strategy<Value = Request> {
    let formats = (
        // each format of weights with one of rows
        (subsequence(WEIGHTS.to_vec(), 1..=3), one_of(ACTIVATIONS.to_vec())),
        one_of(vec![None, Some([1, 32]), Some([128, 128])]),
        one_of(vec![Extras::NONE, Extras::NONE, Extras::ORDER, Extras::ALL]),
        one_of(vec![Activation::Silu, Activation::Gelu]),
        one_of(vec![F32, Bf16, F16]),
    );
    let sizes = (
        one_of(vec![16usize, 40, 64, 128, 200, 2048]),
        one_of(vec![8usize, 48, 64, 96, 768]),
        one_of(vec![RowFormat::Standard, RowFormat::Standard, RowFormat::Batched]),
    );
    let flags = (
        one_of(vec![None, None, Some(Device::Cpu), Some(Device::Cuda)]),
        any::<bool>(),
        any::<bool>(),
        one_of(vec![None, Some("the routing is replayed")]),
    );
    (formats, sizes, flags).prop_map(
        |(((weights, rows), group, extras, function, dtype), sizes, flags)| Request {
            layer: "model.layers.3.mlp".into(),
            kernel: None,
            device: flags.0,
            dtype,
            products: weights
                .into_iter()
                .map(|weights| ProductFormat { weights, group, rows, extras })
                .collect(),
            function,
            hidden: sizes.0,
            intermediate: sizes.1,
            gated: flags.2,
            weight_on: if flags.1 { WeightOn::Input } else { WeightOn::Output },
            biases: flags.1,
            norms: flags.2,
            row_format: sizes.2,
            routed_outside: flags.3,
        },
    )
}

fn machines() -> impl Strategy<Value = Machine> {
    let names: Vec<String> = Machine::names().into_iter().map(|(name, _)| name).collect();
    one_of(names).prop_map(|name| Machine::named(&name).unwrap())
}

fn error(result: Result<moe_runner::oracle::Choice, Error>) -> String {
    result.unwrap_err().to_string()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn every_kernel_is_accounted_for(request in requests(), machine in machines()) {
        let kernels = kernels();
        let fails = |kernel: &KernelDesc| failing_conditions(kernel, &request, &machine);
        let first = kernels.iter().find(|kernel| fails(kernel).is_empty()
            && !kernel.caps.has(Caps::BY_NAME_ONLY)
            && kernel.slow_on(machine.features, &request.products).is_none());
        match select(&kernels, &request, &machine) {
            Ok(choice) => {
                prop_assert_eq!(choice.kernel.name, first.unwrap().name);
                for kernel in &kernels {
                    let able = choice.able.iter().filter(|(k, _)| k.name == kernel.name).count();
                    let mut rejections =
                        choice.rejected.iter().filter(|r| r.kernel.name == kernel.name);
                    let rejected = rejections.next();
                    prop_assert!(rejections.next().is_none());
                    let chosen = usize::from(choice.kernel.name == kernel.name);
                    prop_assert_eq!(chosen + able + usize::from(rejected.is_some()), 1);
                    if let Some(rejection) = rejected {
                        prop_assert!(!rejection.reasons.is_empty());
                        prop_assert_eq!(&rejection.reasons, &fails(kernel));
                    }
                }
                prop_assert!(choice.able.iter().all(|(_, why)| !why.is_empty()));
            }
            Err(none) => {
                prop_assert!(first.is_none());
                // all of them are in the message, with all of their reasons
                let text = none.to_string();
                for kernel in &kernels {
                    prop_assert!(text.contains(kernel.name));
                    for reason in fails(kernel) {
                        prop_assert!(text.contains(&reason.to_string()), "{} in {}", reason, text);
                    }
                }
            }
        }
    }

    #[test]
    fn a_named_kernel_is_used_or_refused_with_the_same_words(
        request in requests(),
        machine in machines(),
    ) {
        let kernels = kernels();
        for kernel in &kernels {
            let named = Request { kernel: Some(kernel.name.into()), ..request.clone() };
            let reasons = failing_conditions(kernel, &request, &machine);
            match select(&kernels, &named, &machine) {
                Ok(choice) => {
                    prop_assert_eq!(choice.kernel.name, kernel.name);
                    prop_assert!(reasons.is_empty());
                }
                Err(refusal) => {
                    prop_assert!(!reasons.is_empty(), "{}", refusal);
                    let text = refusal.to_string();
                    for reason in &reasons {
                        prop_assert!(text.contains(&reason.to_string()), "{} in {}", reason, text);
                    }
                }
            }
        }
    }

    #[test]
    fn each_fix_removes_its_reason_and_all_of_them_enable_the_kernel(
        request in requests(),
        machine in machines(),
    ) {
        for kernel in kernels() {
            let reasons = failing_conditions(kernel, &request, &machine);
            let (mut all_request, mut all_machine) = (request.clone(), machine.clone());
            for reason in &reasons {
                let (mut request, mut machine) = (request.clone(), machine.clone());
                reason.fix.apply(&mut request, &mut machine);
                let left = failing_conditions(kernel, &request, &machine);
                let others: Vec<_> = reasons.iter().filter(|r| *r != reason).cloned().collect();
                prop_assert_eq!(left, others, "{}: {}", kernel.name, reason);
                reason.fix.apply(&mut all_request, &mut all_machine);
            }
            prop_assert_eq!(failing_conditions(kernel, &all_request, &all_machine), vec![]);
            // an entry takes a projection as a whole, or what it does not take is one of the reasons
            let formats = reasons.iter().any(|reason| {
                use Change::{Activations, Extras, Groups, Weights};
                let fix = &reason.fix;
                matches!(fix, Weights { .. } | Activations { .. } | Groups { .. } | Extras { .. })
            });
            let taken = request.products.iter().all(|product| kernel.scheme(product).is_some());
            prop_assert_eq!(taken, !formats, "{}", kernel.name);
        }
    }
}

/// The smallest change: not any larger size, the next one; not any GPU, the oldest that will do.
#[test]
fn reasons_and_fixes_in_words() {
    let request = Request {
        layer: "l".into(),
        kernel: None,
        device: Some(Device::Cpu),
        dtype: F32,
        products: vec![ProductFormat {
            weights: WeightFormat::Int8(Granularity::Channel),
            group: Some([1, 130]),
            rows: ActivationFormat::Int8Token,
            extras: Extras::ALL,
        }],
        function: Activation::Gelu,
        hidden: 130,
        intermediate: 64,
        gated: false,
        weight_on: WeightOn::Input,
        biases: true,
        norms: true,
        row_format: RowFormat::Standard,
        routed_outside: Some("the routing is replayed"),
    };
    let reasons = |machine: &str| {
        let machine = Machine::named(machine).unwrap();
        let all = failing_conditions(&CUDA, &request, &machine);
        all.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(
        reasons("sm90"),
        [
            "runs on cuda, cpu was asked for (the device cuda)",
            "needs an NVIDIA GPU of sm100 (Blackwell: B200, GB200); sm90 has sm90 (Hopper: H100, \
             H200, GH200) (an NVIDIA GPU of sm100 (Blackwell: B200, GB200) or newer)",
            "cannot read int8 (channel) weights (a checkpoint in nvfp4, mxfp4)",
            "reads no weights of which 1 × 130 share a scale (a checkpoint with a scale for each \
             1 × 16 or 1 × 32)",
            "reads no weights with columns in an order of their own (act-order) and scales that bf16 does \
             not hold (a checkpoint with columns in order and scales in bf16)",
            "does not take activations as int8 (token) (a checkpoint with activations as nvfp4)",
            "does not compute Gelu between the products (experts with Silu)",
            "does not take f32 hidden states (hidden states in bf16 or f16)",
            "needs a hidden size in multiples of 128; it is 130 (a hidden size of 256)",
            "computes no experts without a gate projection (experts with one)",
            "does not apply weights to the experts' input (a layer that weighs their output)",
            "adds no biases to the experts' products (experts without biases)",
            "does not normalise the experts' outputs (experts without a norm)",
            "takes batched rows, the exchange delivers standard ones (an exchange that delivers \
             batched rows)",
            "routes by itself, but routing must happen outside: the routing is replayed (a run \
             without that)",
        ]
    );
    assert_eq!(reasons("sm100").len(), reasons("sm90").len() - 1);
    let avx2 = reasons("avx2");
    assert!(avx2[1].starts_with("needs an NVIDIA GPU, which avx2 does not have"), "{avx2:?}");
    let machine = Machine::named("avx2").unwrap();
    for (kernel, needs, and) in [
        ("cpu_avx512", "avx512", ""),
        ("cpu_avx512_vnni", "avx512_vnni", ""),
        ("cpu_avx512_bf16", "avx512_bf16", ""),
        ("cpu_amx_bf16", "amx_bf16", " and a system that lets this process use its tiles"),
    ] {
        let kernel = KERNELS.iter().find(|known| known.name == kernel).unwrap();
        let reason = &failing_conditions(kernel, &request, &machine)[0];
        let words =
            format!("needs {needs}, which avx2 does not have (a processor with {needs}{and})");
        assert_eq!(reason.to_string(), words);
    }
}

/// Where dot products of bf16 are slower than f32 (processors with tiles), they run when named.
#[test]
fn what_is_slow_on_a_machine_is_not_its_default() {
    let bf16 = Request::of(&layer("mixtral_bf16"), Bf16);
    let choice = |request: &Request, machine: &Machine, kernel: Option<&str>| {
        let request = Request { kernel: kernel.map(Into::into), ..request.clone() };
        select(KERNELS, &request, machine).unwrap().kernel.name
    };
    let chosen = |machine: &Machine, kernel: Option<&str>| choice(&bf16, machine, kernel);
    let mut machine = Machine::named("avx512_bf16").unwrap();
    assert_eq!(chosen(&machine, None), "cpu_avx512_bf16");
    machine.features = machine.features.with(moe_kernels::isa::Features::AMX_TILE);
    assert_eq!(chosen(&machine, None), "cpu_avx512");
    assert_eq!(chosen(&machine, Some("cpu_avx512_bf16")), "cpu_avx512_bf16");
    // the tiles' own products are not slow, where the system lets a process use them
    machine.features = machine.features.with(moe_kernels::isa::Features::AMX_BF16);
    assert_eq!(chosen(&machine, None), "cpu_amx_bf16");
    assert_eq!(chosen(&machine, Some("cpu_avx512")), "cpu_avx512");
    let int4 = Request::of(&layer("quant_qwen3_moe_w4a16_g128"), Bf16);
    assert_eq!(choice(&int4, &machine, None), "cpu_amx_bf16");
    // but few tokens of other weights that must be decoded for them take longer
    let mxfp4 = Request::of(&layer("gpt_oss_mxfp4"), Bf16);
    assert_eq!(choice(&mxfp4, &machine, None), "cpu_avx512");
    assert_eq!(choice(&mxfp4, &machine, Some("cpu_amx_bf16")), "cpu_amx_bf16");
    // quantised rows are no different, but that integers have dot products of their own on all machines
    for (case, on_bf16, on_amx) in [
        ("quant_qwen3_moe_fp8_channel", "cpu_avx512_bf16", "cpu_avx512"),
        ("quant_qwen3_moe_fp8_block", "cpu_avx512_bf16", "cpu_avx512"),
        ("quant_qwen3_moe_int8_channel", "cpu_avx512_vnni", "cpu_avx512_vnni"),
        ("quant_qwen3_moe_nvfp4", "cpu_avx512", "cpu_avx512"),
    ] {
        let request = Request::of(&layer(case), Bf16);
        let bf16 = Machine::named("avx512_bf16").unwrap();
        assert_eq!(choice(&request, &bf16, None), on_bf16, "{case}");
        assert_eq!(choice(&request, &machine, None), on_amx, "{case}");
    }
    // rows of any dtype become integers
    let int8 = Request::of(&layer("quant_qwen3_moe_int8_channel"), F32);
    let vnni = Machine::named("avx512_vnni").unwrap();
    assert_eq!(choice(&int8, &vnni, None), "cpu_avx512_vnni");
    for machine in ["avx2", "avx512"] {
        assert_eq!(choice(&int8, &Machine::named(machine).unwrap(), None), "cpu_avx2_q8");
    }
}

/// Code for sm_90a runs on that architecture alone, not on newer ones; and a kernel takes formats
/// together, not each for itself.
#[test]
fn exact_architectures_and_pairs_of_formats() {
    let (group, extras) = (Some([1, 32]), Extras::NONE);
    let product = |weights, rows| ProductFormat { weights, group, rows, extras };
    let request = |weights, rows| Request {
        products: vec![product(weights, rows)],
        ..Request::of(&layer("quant_qwen3_moe_nvfp4"), Bf16)
    };
    let reasons = |weights, rows, machine: &str| {
        let machine = Machine::named(machine).unwrap();
        let all = failing_conditions(&CUDA_HOPPER, &request(weights, rows), &machine);
        all.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let fp8 = WeightFormat::Fp8(Granularity::Channel);
    let (token, none) = (ActivationFormat::Fp8Token, ActivationFormat::Unquantised);
    assert_eq!(reasons(fp8, token, "sm90a"), [] as [&str; 0]);
    assert_eq!(reasons(WeightFormat::Mxfp4, none, "sm90"), [] as [&str; 0]);
    let newer = reasons(fp8, token, "sm100");
    assert_eq!(newer.len(), 1, "{newer:?}");
    assert!(newer[0].ends_with("(an NVIDIA GPU of sm90 (Hopper: H100, H200, GH200))"), "{newer:?}");
    assert_eq!(
        reasons(WeightFormat::Mxfp4, token, "sm90"),
        ["does not take activations as fp8 (token) (a checkpoint with activations as unquantised)"]
    );
    // what it makes of rows by itself is where the reference quantises too
    assert_eq!(CUDA_HOPPER.rows_of(&product(WeightFormat::Mxfp4, none)), token);
    assert_eq!(CUDA_HOPPER.rows_of(&product(fp8, token)), token);
}

#[test]
fn machines_by_name() {
    let chosen = |machine: &str| {
        let layer = layer("quant_qwen3_moe_nvfp4");
        let machine = Machine::named(machine).unwrap();
        select(KERNELS, &Request::of(&layer, Bf16), &machine).unwrap().kernel.name
    };
    assert_eq!(chosen("portable"), "cpu_portable");
    assert_eq!(chosen("avx2"), "cpu_avx2");
    assert_eq!(chosen("AVX512"), "cpu_avx512");
    assert_eq!(chosen("avx512_bf16"), "cpu_avx512"); // the rows are quantised
    assert_eq!(chosen("sm90"), "cpu_avx512");
    let capability = |name: &str| Machine::named(name).unwrap().compute_capability;
    assert_eq!(["sm90", "sm_90", "SM90a"].map(capability), [Some(90); 3]);
    assert_eq!(capability("sm100"), Some(100));
    for unknown in ["", "sm", "sm91", "smx", "avx", "sm-90", "sm4294967386"] {
        let text = Machine::named(unknown).unwrap_err().to_string();
        assert!(
            text.contains("portable, avx2, avx512, avx512_vnni, avx512_bf16, amx_bf16, sm70"),
            "{unknown}: {text}"
        );
    }
}

fn layer(case: &str) -> LoadedLayer {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case);
    let checkpoint = Checkpoint::open(&case).unwrap();
    let entry = architecture::layers(&checkpoint).unwrap().remove(0);
    LoadedLayer::load(&checkpoint, &entry).unwrap()
}

fn options(kernel: Option<&str>, dtype: ActivationDtype) -> Options {
    Options { kernel: kernel.map(str::to_owned), ..Options::new(dtype, 1).unwrap() }
}

/// W8A8 in int8 and fp8 goes the same way as every other format: chosen, listed, refused.
#[test]
fn w8a8_of_compressed_tensors_is_chosen_and_refused_like_all_formats() {
    for (case, weights, activations) in [
        ("quant_qwen3_moe_int8_channel", "int8 (channel)", "int8 (token)"),
        ("quant_qwen3_moe_fp8_channel", "fp8 (channel)", "fp8 (token)"),
    ] {
        let layer = layer(case);
        let choice = layer.choose(&options(None, Bf16)).unwrap();
        assert!(choice.kernel.name.starts_with("cpu_"), "{case}: {}", choice.kernel.name);
        for name in ["emulation_nvfp4", "emulation_ocp_mx", "emulation_mxfp8"] {
            let rejection = choice.rejected.iter().find(|r| r.kernel.name == name).unwrap();
            let reasons: Vec<String> = rejection.reasons.iter().map(ToString::to_string).collect();
            assert!(reasons[0].starts_with(&format!("cannot read {weights} weights")), "{case}");
            let activations = format!("does not take activations as {activations}");
            assert!(reasons[1].starts_with(&activations), "{case}: {reasons:?}");
            let refusal = layer.ready(&options(Some(name), Bf16)).unwrap_err().to_string();
            for reason in reasons {
                assert!(refusal.contains(&reason), "{case}: {reason} in {refusal}");
            }
        }
        for (kernel, _) in &choice.able {
            let named = layer.choose(&options(Some(kernel.name), Bf16)).unwrap();
            assert_eq!(named.kernel.name, kernel.name, "{case}");
        }
    }
}

/// What one projection of one expert is stored as counts as what all others are.
#[test]
fn one_projection_of_another_format_is_seen() {
    let mut layer = layer("quant_qwen3_moe_nvfp4");
    let choose = |layer: &LoadedLayer| layer.choose(&options(Some("emulation_nvfp4"), Bf16));
    choose(&layer).unwrap();
    let last = layer.experts.last_mut().unwrap();
    let shape = [last.down.rows(), last.down.cols()];
    let floats = Matrix::from_f32(&vec![0.5; shape[0] * shape[1]], shape).unwrap();
    last.down = floats.with_input(last.down.input);
    let error = choose(&layer).unwrap_err().to_string();
    assert!(error.contains("cannot read f32 weights"), "{error}");
}

#[test]
fn a_name_that_no_kernel_has_is_answered_with_all_names() {
    let request = Request {
        kernel: Some("emulation".into()),
        ..Request::of(&layer("quant_qwen3_moe_nvfp4"), Bf16)
    };
    let text = error(select(KERNELS, &request, &Machine::detect()));
    for kernel in KERNELS {
        assert!(text.contains(kernel.name), "{text}");
    }
}

/// INT4 by groups of 128 runs on Hopper's own kernel where its codes can be packed for it; what an AWQ or GPTQ
/// checkpoint may have beside them is said, and runs in f32.
#[test]
fn int4_on_hopper() {
    let choose = |weights: fn(Granularity) -> WeightFormat, extras| {
        let product = ProductFormat {
            weights: weights(Granularity::Group),
            group: Some([1, 128]),
            rows: ActivationFormat::Unquantised,
            extras,
        };
        let request = Request {
            device: Some(Device::Cuda),
            products: vec![product],
            hidden: 2048,
            intermediate: 768,
            ..Request::of(&layer("mixtral_bf16"), Bf16)
        };
        select(KERNELS, &request, &Machine::named("sm90").unwrap()).unwrap()
    };
    assert_eq!(choose(WeightFormat::Int4, Extras::NONE).kernel.name, "cuda_sm90_int4");
    for (weights, extras, why) in [
        (WeightFormat::Int4Asymmetric as fn(_) -> _, Extras::NONE, "zero points)"),
        (
            WeightFormat::Int4,
            Extras::ORDER,
            "columns in an order of their own (act-order) (a checkpoint with columns in order)",
        ),
        (
            WeightFormat::Int4,
            Extras::FINE_SCALES,
            "scales that bf16 does not hold (a checkpoint with scales in bf16)",
        ),
    ] {
        let choice = choose(weights, extras);
        assert_eq!(choice.kernel.name, "cuda_f32");
        let int4 = choice.rejected.iter().find(|r| r.kernel.name == "cuda_sm90_int4").unwrap();
        assert!(int4.to_string().contains(why), "{int4}");
    }
}

/// What codes have beside scales is read off the weights.
#[test]
fn extras_of_weights() {
    let plain = layer("quant_qwen3_moe_w4a16_g128");
    let extras = |matrix: &Matrix| ProductFormat::of(matrix).extras;
    assert_eq!(extras(&plain.experts[0].up), Extras::NONE);
    let codes = plain.experts[0].up.codes().unwrap().clone();
    let columns = codes.cols() as u32;
    let backwards = (0..columns).rev().map(|k| k / 128).collect();
    let ordered = Matrix::new(codes.with_groups(backwards).unwrap());
    assert_eq!(extras(&ordered), Extras::ORDER);
    for (scales, wanted) in [
        (ScaleType::Bf16, Extras::NONE),
        (ScaleType::F16, Extras::FINE_SCALES),
        (ScaleType::F32, Extras::FINE_SCALES),
    ] {
        let (element, granularity, block) = (Element::Uint4, Granularity::Group, [1, 128]);
        let format = RandomScaled { element, scales, granularity, block, input: None };
        let random = random_layer(&plain.spec, RandomFormat::Scaled(format), 1).unwrap();
        assert_eq!(extras(&random.experts[0].down), wanted, "{scales}");
    }
}
