//! Capture, its file, replay, and simulated routing.

use std::path::Path;

use moe_runner::router::{
    LogicalId, Replay, Router, RouterTensors, Routing, Simulator, Strategy, Trace,
};
use moe_runner::spec::{IdleExperts, RouterSpec, Score, WeightFrom};

use super::{assert_weights, ids, logical, numbers, scored};

fn router(experts: usize, top_k: usize) -> Router {
    let spec = RouterSpec::softmax(experts, top_k, true);
    Router::new(spec, 1.0, RouterTensors::default()).unwrap()
}

fn routed(router: &Router, seed: u64, tokens: usize) -> (Vec<f32>, Routing) {
    let logits = numbers(seed, tokens * router.spec().logits());
    let mut out = Routing::new();
    router.route(&logits, None, tokens, &mut out).unwrap();
    (logits, out)
}

/// Two layers of different sizes, three calls, one of them empty.
fn recorded() -> (Trace, [Router; 2], Vec<Routing>) {
    let routers = [router(6, 2), router(300, 5)];
    let mut trace = Trace::new();
    let mut all = Vec::new();
    for (call, tokens) in [7, 0, 1].into_iter().enumerate() {
        for (layer, router) in routers.iter().enumerate() {
            let (_, routing) = routed(router, (call * 10 + layer) as u64, tokens);
            trace.record(&format!("layers.{layer}.mlp"), router.spec(), &routing).unwrap();
            all.push(routing);
        }
    }
    (trace, routers, all)
}

#[test]
fn a_trace_survives_its_file() {
    let (trace, routers, all) = recorded();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("routing.safetensors");
    trace.save(&path).unwrap();
    let loaded = Trace::load(&path).unwrap();
    assert_eq!(loaded, trace);
    for (index, router) in routers.iter().enumerate() {
        let layer = &loaded.layers()[index];
        assert_eq!(layer.name(), format!("layers.{index}.mlp"));
        assert_eq!((layer.choices(), layer.top_k()), (router.spec().experts, router.spec().top_k));
        assert_eq!((layer.calls(), layer.tokens()), (&[7, 0, 1][..], 8));
        let expected: Vec<LogicalId> =
            all.iter().skip(index).step_by(2).flat_map(|routing| routing.ids.clone()).collect();
        assert_eq!(layer.ids().collect::<Vec<_>>(), expected);
    }
    // One byte for each id of 6 experts, two for each of 300: 8·2 + 8·5·2, behind a header.
    let bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    assert_eq!(bytes.len() - 8 - header, 16 + 80);
    Trace::new().save(&path).unwrap();
    assert_eq!(Trace::load(&path).unwrap(), Trace::new());
}

#[test]
fn wide_ids() {
    let experts = 70_000;
    let spec = RouterSpec::softmax(experts, 2, false);
    let routing = Routing::from_parts(2, logical(&[69_999, 65_536, 3, 0]), vec![0.5; 4]).unwrap();
    let mut trace = Trace::new();
    trace.record("mlp", &spec, &routing).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t");
    trace.save(&path).unwrap();
    let ids: Vec<_> = Trace::load(&path).unwrap().layers()[0].ids().collect();
    assert_eq!(ids, routing.ids);
    assert_eq!(Trace::load(&path).unwrap().layer("mlp").unwrap().tokens(), 2);
}

#[test]
fn recording_refuses_what_does_not_fit() {
    let (mut trace, routers, all) = recorded();
    let before = trace.clone();
    let error = trace.record("layers.0.mlp", routers[1].spec(), &all[1]).unwrap_err().to_string();
    assert!(error.contains("recorded with 6 experts and top-k 2; it has 300 and 5"), "{error}");
    assert!(trace.record("new", routers[0].spec(), &all[1]).is_err());
    let foreign = Routing::from_parts(2, logical(&[0, 6]), vec![0.5; 2]).unwrap();
    let error = trace.record("new", routers[0].spec(), &foreign).unwrap_err().to_string();
    assert!(error.contains("layer 'new': expert 6 of 6"), "{error}");
    assert_eq!(trace, before);
}

#[test]
fn replay_forces_ids_and_weighs_todays_logits() {
    // Two experts of sigmoid scores; the trace says 0 although today 1 is better.
    let spec = scored(Score::Sigmoid, 2, 1);
    let router = Router::new(spec, 2.0, RouterTensors::default()).unwrap();
    let mut out = Routing::new();
    let mut trace = Trace::new();
    router.route(&[1.0, 0.0], None, 1, &mut out).unwrap();
    trace.record("mlp", router.spec(), &out).unwrap();
    let mut replay = Replay::new(trace);
    replay.route("mlp", &router, &[0.0, 5.0], 1, &mut out).unwrap();
    assert_eq!(ids(&out), [0]);
    assert_weights(&out.weights, &[1.0]);
}

/// Two layers and two calls with ids that are written down, and logits that would choose others.
#[test]
fn replay_gives_every_layer_and_every_call_its_own_ids() {
    let router = router(6, 1);
    let mut trace = Trace::new();
    let calls = [("a", [0, 1, 2]), ("b", [5, 4, 3]), ("a", [3, 4, 5]), ("b", [2, 1, 0])];
    for (layer, chosen) in calls {
        let routing = Routing::from_parts(1, logical(&chosen), vec![1.0; 3]).unwrap();
        trace.record(layer, router.spec(), &routing).unwrap();
    }
    let mut replay = Replay::new(trace);
    let mut out = Routing::new();
    for (layer, chosen) in calls {
        replay.route(layer, &router, &numbers(1, 3 * 6), 3, &mut out).unwrap();
        assert_eq!(ids(&out), chosen, "{layer}");
    }
}

#[test]
fn replay_of_the_same_logits_is_the_same_routing() {
    let (trace, routers, all) = recorded();
    let mut replay = Replay::new(trace);
    for _ in 0..2 {
        assert!(replay.finish().is_err());
        let mut all = all.iter();
        for (call, tokens) in [7, 0, 1].into_iter().enumerate() {
            for (layer, router) in routers.iter().enumerate() {
                let (logits, expected) = routed(router, (call * 10 + layer) as u64, tokens);
                let mut out = Routing::new();
                let name = format!("layers.{layer}.mlp");
                replay.route(&name, router, &logits, tokens, &mut out).unwrap();
                assert_eq!((&out.ids, &out.weights), (&expected.ids, &expected.weights));
                assert_eq!(out.ids, all.next().unwrap().ids);
            }
        }
        replay.finish().unwrap();
        replay.rewind();
    }
}

#[test]
fn replay_refuses_what_does_not_fit() {
    let (trace, routers, _) = recorded();
    let mut replay = Replay::new(trace);
    let mut out = Routing::new();
    let mut refused = |replay: &mut Replay, layer: &str, router: &Router, tokens: usize| {
        let logits = vec![0.0; tokens * router.spec().logits()];
        let error = replay.route(layer, router, &logits, tokens, &mut out).unwrap_err();
        assert_eq!((out.tokens, out.ids.len()), (0, 0));
        error.to_string()
    };
    let error = refused(&mut replay, "layers.9.mlp", &routers[0], 7);
    assert!(error.contains("no layer 'layers.9.mlp'"), "{error}");
    let error = refused(&mut replay, "layers.0.mlp", &routers[0], 3);
    assert!(error.contains("call 0: 3 tokens, 7 when it was captured"), "{error}");
    let error = refused(&mut replay, "layers.0.mlp", &router(6, 3), 7);
    assert!(error.contains("recorded with 6 experts and top-k 2; it has 6 and 3"), "{error}");
    // A refused call does not advance the replay.
    for tokens in [7, 0, 1] {
        let logits = vec![0.0; tokens * 6];
        replay.route("layers.0.mlp", &routers[0], &logits, tokens, &mut Routing::new()).unwrap();
    }
    let error = refused(&mut replay, "layers.0.mlp", &routers[0], 1);
    assert!(error.contains("called 3 times"), "{error}");
    let error = replay.finish().unwrap_err().to_string();
    assert!(error.contains("layer 'layers.1.mlp': 0 of 3"), "{error}");
}

/// Writes a trace file with this metadata and one U8 tensor of ids.
fn write(path: &Path, metadata: Option<&str>, name: &str, shape: Vec<usize>, data: &[u8]) {
    use safetensors::tensor::{Dtype, TensorView};
    let view = TensorView::new(Dtype::U8, shape, data).unwrap();
    let metadata = metadata.map(|text| [("moe_routing_trace".to_owned(), text.to_owned())].into());
    std::fs::write(path, safetensors::serialize([(name, view)], metadata).unwrap()).unwrap();
}

#[test]
fn damaged_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.safetensors");
    let layer = |choices: usize, top_k: usize, calls: &str| {
        format!(
            r#"{{"version":1,"layers":[{{"name":"m","choices":{choices},"top_k":{top_k},"calls":{calls}}}]}}"#
        )
    };
    let load = |metadata: Option<&str>, name: &str, shape: [usize; 2], data: &[u8]| {
        write(&path, metadata, name, shape.to_vec(), data);
        Trace::load(&path)
    };
    let good = layer(4, 2, "[1,2]");
    assert!(load(Some(&good), "m.topk_ids", [3, 2], &[0, 1, 2, 3, 0, 2]).is_ok());
    let twice = good.replace("}]}", r#"},{"name":"m","choices":4,"top_k":2,"calls":[1,2]}]}"#);
    let cases = [
        (None, "no 'moe_routing_trace'"),
        (Some("{".to_owned()), "bad 'moe_routing_trace'"),
        (Some("[".repeat(10_000)), "bad 'moe_routing_trace'"),
        (Some(good.replace("\"version\":1", "\"version\":2")), "version 2"),
        (Some(layer(4, 2, "[1,1]")), "shape [3, 2]"),
        (Some(layer(4, 3, "[1,1]")), "shape [3, 2]"),
        (Some(layer(4, 2, "[18446744073709551615,4]")), "shape [3, 2]"),
        (Some(layer(3, 2, "[1,2]")), "row 1: expert 3 of 3"),
        (Some(layer(0, 2, "[1,2]")), "0 experts"),
        (Some(layer(1 << 60, 2, "[1,2]")), "experts"),
        (Some(layer(4, 0, "[1,2]")), "top-k is 0"),
        (Some(layer(4, 5, "[1,2]")), "top-k is 5"),
        (Some(layer(4, 2, "[-1,4]")), "bad 'moe_routing_trace'"),
        (Some(good.replace("\"m\"", "\"other\"")), "tensor 'other.topk_ids': missing"),
        (Some(r#"{"version":1,"layers":[]}"#.to_owned()), "1 tensors for 0 layers"),
        (Some(twice), "occurs twice"),
    ];
    for (metadata, reason) in cases {
        let error = load(metadata.as_deref(), "m.topk_ids", [3, 2], &[0, 1, 2, 3, 0, 2])
            .unwrap_err()
            .to_string();
        assert!(error.contains(reason) && error.contains("trace.safetensors"), "{error}");
    }
    // Any cut, and any garbage, is an error and no panic.
    write(&path, Some(&good), "m.topk_ids", vec![3, 2], &[0, 1, 2, 3, 0, 2]);
    let bytes = std::fs::read(&path).unwrap();
    for length in 0..bytes.len() {
        std::fs::write(&path, &bytes[..length]).unwrap();
        assert!(Trace::load(&path).is_err(), "cut at {length}");
    }
    assert!(Trace::load(&folder.path().join("none")).is_err());
}

#[test]
fn strategies_have_names() {
    for strategy in Strategy::ALL {
        assert_eq!(strategy.name().parse::<Strategy>().unwrap(), strategy);
    }
    let error = "zipf".parse::<Strategy>().unwrap_err().to_string();
    assert!(error.contains("'zipf'"), "{error}");
    assert!(error.contains("uniform_random, normal_routing, round_robin"), "{error}");
}

fn simulate(strategy: Strategy, seed: u64, spec: &RouterSpec, tokens: usize) -> Routing {
    let mut out = Routing::new();
    Simulator::new(strategy, seed).route(spec, tokens, &mut out).unwrap();
    out
}

#[test]
fn uniform_routing() {
    let idle = Some(IdleExperts::Identity { count: 2 });
    let spec = RouterSpec { idle, ..RouterSpec::softmax(8, 3, true) };
    let routing = simulate(Strategy::UniformRandom, 1, &spec, 4000);
    for token in 0..4000 {
        let [a, b, c] = *routing.ids_of(token) else { panic!("k is 3") };
        assert!(a != b && b != c && a != c);
    }
    assert!(routing.weights.iter().all(|&weight| weight == 1.0));
    // 4000·3/10 = 1200 on each; the standard deviation is 29.
    assert!(routing.load(10).iter().all(|&load| load.abs_diff(1200) < 5 * 29));
    // First slots are uniform too.
    let first =
        Routing::from_parts(1, routing.ids.iter().step_by(3).copied().collect(), vec![1.0; 4000]);
    assert!(first.unwrap().load(10).iter().all(|&load| load.abs_diff(400) < 5 * 19));
}

#[test]
fn normal_routing() {
    let spec = RouterSpec::softmax(4, 3, true);
    let routing = simulate(Strategy::Normal, 1, &spec, 4000);
    // sigmoid(N) < ¼ where N < −ln 3: 13.6 %; then 36.4 %, and the same mirrored. σ < 53.
    let load = routing.load(4);
    for (load, expected) in load.iter().zip([1632, 4368, 4368, 1632]) {
        assert!(load.abs_diff(expected) < 5 * 53, "{load}, expected {expected}");
    }
    let repeated = (0..4000).any(|token| {
        let [a, b, _] = *routing.ids_of(token) else { panic!("k is 3") };
        a == b
    });
    assert!(repeated);
    for token in 0..4000 {
        let weights = routing.weights_of(token);
        assert!(weights.iter().all(|&weight| weight >= 0.0));
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }
}

#[test]
fn round_robin_routing() {
    let routing = simulate(Strategy::RoundRobin, 1, &RouterSpec::softmax(5, 2, true), 5);
    assert_eq!(ids(&routing), [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]);
    assert_eq!(routing.load(5), [2; 5]);
}

#[test]
fn simulations_follow_from_the_seed() {
    let weight_from = WeightFrom::JointSoftmax { shared: 2 };
    let spec = RouterSpec { weight_from, ..scored(Score::Sigmoid, 64, 4) };
    for strategy in [Strategy::UniformRandom, Strategy::Normal] {
        let one = simulate(strategy, 7, &spec, 20);
        let same = simulate(strategy, 7, &spec, 20);
        assert_eq!((&one.ids, &one.weights), (&same.ids, &same.weights));
        assert_ne!(one.ids, simulate(strategy, 8, &spec, 20).ids);
        assert_eq!(one.shared_weights, [1.0; 40]);
    }
    // The next call draws other numbers.
    let mut simulator = Simulator::new(Strategy::UniformRandom, 7);
    let (mut first, mut second) = (Routing::new(), Routing::new());
    simulator.route(&spec, 20, &mut first).unwrap();
    simulator.route(&spec, 20, &mut second).unwrap();
    assert_ne!(first.ids, second.ids);
    let too_many = RouterSpec { top_k: 65, ..spec };
    assert!(simulator.route(&too_many, 1, &mut first).is_err());
}
