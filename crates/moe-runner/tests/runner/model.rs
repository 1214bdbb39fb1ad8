//! A model's layers by name, and what is known of a layer before anything runs.

use moe_runner::Error;
use moe_runner::hidden::ActivationDtype::F32;
use moe_runner::runner::{Model, MoeRunner};
use moe_runner::weights::{FloatType, random_layer};

use super::layers::{forward, options, plain, rows, runner, variants};

fn named(name: &str, seed: u64) -> MoeRunner {
    let mut spec = plain();
    spec.name = name.into();
    runner(&random_layer(&spec, FloatType::F32, seed).unwrap(), None, F32)
}

#[test]
fn layers_have_their_names() {
    let mut model = Model::new();
    for i in 0..12 {
        model.insert(named(&format!("model.layers.{i}.mlp"), i)).unwrap();
    }
    assert_eq!(model.names().nth(11), Some("model.layers.11.mlp"));
    // the layer of that name, not the n-th that was asked for
    let hidden = rows(F32, 2, 48, 1);
    for i in [7, 3, 7] {
        let name = format!("model.layers.{i}.mlp");
        let found = model.get_layer_from_name(&name).unwrap();
        assert_eq!(found.spec().name, name);
        assert_eq!(forward(found, &hidden), forward(&mut named(&name, i), &hidden));
    }
    let error = model.insert(named("model.layers.3.mlp", 0)).unwrap_err();
    assert!(matches!(&error, Error::DuplicateLayer { name } if name == "model.layers.3.mlp"));
    assert_eq!(model.names().count(), 12);
}

#[test]
fn an_unknown_name_is_answered_with_the_near_ones() {
    let mut model = Model::new();
    let error = model.get_layer_from_name("model.layers.0.mlp").unwrap_err();
    assert!(matches!(&error, Error::UnknownLayer { near, .. } if near.is_empty()));
    assert_eq!(error.to_string(), "no MoE layer 'model.layers.0.mlp'");
    for name in
        ["model.layers.1.mlp", "model.layers.2.mlp", "model.layers.30.mlp", "vision.blocks.7.moe"]
    {
        model.insert(named(name, 0)).unwrap();
    }
    for (asked, first) in [
        ("model.layers.3.mlp", "model.layers.1.mlp"), // one character from three; lowest first
        ("model.layer.2.mlp", "model.layers.2.mlp"),
        ("layers.30.mlp", "model.layers.30.mlp"),
        ("vision.blocks.7.mlp", "vision.blocks.7.moe"),
    ] {
        let Err(Error::UnknownLayer { name, near }) = model.get_layer_from_name(asked) else {
            panic!("'{asked}' is found")
        };
        assert_eq!(name, asked);
        assert_eq!(near.first().map(String::as_str), Some(first), "{asked}: {near:?}");
        assert_eq!(near.len(), 3);
        assert!(model.get_layer_from_name(asked).unwrap_err().to_string().contains(first));
    }
}

#[test]
fn shapes_and_workspace_are_known_before_anything_runs() {
    for (name, spec) in variants() {
        assert_eq!(spec.output_shape(0), [0, 48]);
        assert_eq!(spec.output_shape(7), [7, 48]);
        let layer = random_layer(&spec, FloatType::F32, 1).unwrap();
        let runner = MoeRunner::new(layer.ready(&options(None, F32)).unwrap());
        assert_eq!(runner.dtype(), F32);
        let [none, one, ten] = [0, 1, 10].map(|tokens| runner.workspace_bytes(tokens));
        assert!(none < one && 5 * (one - none) < ten - none, "{name}: {none}, {one}, {ten}");
    }
}
