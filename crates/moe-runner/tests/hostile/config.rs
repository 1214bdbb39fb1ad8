//! Configs that are broken, huge or nonsense.

use moe_runner::checkpoint::{Checkpoint, Config};

use super::{one_line, safetensors_bytes, write};

fn open(json: impl AsRef<[u8]>) -> moe_runner::Result<Config> {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "config.json", json);
    write(folder.path(), "model.safetensors", safetensors_bytes("{}", 0));
    Checkpoint::open(folder.path()).map(|opened| opened.config().unwrap().clone())
}

#[test]
fn files_that_are_no_config() {
    let deep = "{\"a\":".repeat(200);
    let many = format!("{{\"a\":[{}0]}}", "0,".repeat(1 << 18));
    let long = format!("{{\"a\":\"{}\"}}", "x".repeat(16 << 20));
    let cases: [(&[u8], &str); 10] = [
        (b"", "is no valid JSON"),
        (b"garbage", "is no valid JSON"),
        (b"{\"a\": 1", "is no valid JSON"),
        (b"[1]", "is no JSON object"),
        (b"\"text", "is no valid JSON"),
        (b"{\"a\": \"\xff\"}", "is no valid JSON"),
        (b"{\"a\": 1e999}", "is no valid JSON: number out of range"),
        (deep.as_bytes(), "recursion limit exceeded"),
        (many.as_bytes(), "has more than 262144 values"),
        (long.as_bytes(), "is longer than 16 MiB"),
    ];
    for (json, wanted) in cases {
        let message = one_line(open(json).unwrap_err(), "config.json");
        assert!(message.contains(wanted), "{message}\n  should say: {wanted}");
    }
}

const VALUES: &str = r#"{
    "n": 8, "zero": 0, "null": null, "negative": -1, "float": 8.0, "text": "8\u001b", "large": 99999999999,
    "x": 2.5, "nan": NaN, "list": [1, 2], "mixed": [1, "a"], "limits": [0.0, -Infinity, Infinity],
    "texts": ["a", "NaN, Infinity"], "yes": true, "big": 1e300,
    "sub": {"n": 3, "bad": "x", "deeper": {"m": 4}}
}"#;

#[test]
fn values_that_are_right() {
    let config = open(VALUES).unwrap();
    assert_eq!(config.usize("n").unwrap(), Some(8));
    assert_eq!(config.usize("zero").unwrap(), Some(0));
    assert_eq!(config.usize("null").unwrap(), None);
    assert_eq!(config.usize("absent").unwrap(), None);
    assert_eq!(config.usize("n.of.nothing").unwrap(), None);
    assert_eq!(config.usize("sub.deeper.m").unwrap(), Some(4));
    assert_eq!(config.i64("negative").unwrap(), Some(-1));
    assert_eq!(config.f32("x").unwrap(), Some(2.5));
    assert_eq!(config.f32("n").unwrap(), Some(8.0));
    assert_eq!(config.bool("yes").unwrap(), Some(true));
    assert_eq!(config.usize_list("list").unwrap(), Some(vec![1, 2]));
    assert_eq!(config.f32_list("list").unwrap(), Some(vec![1.0, 2.0]));
    assert_eq!(config.str_list("texts").unwrap(), Some(vec!["a", "NaN, Infinity"]));
    let sub = config.sub("sub").unwrap().unwrap();
    assert_eq!(sub.usize("n").unwrap(), Some(3));
    assert_eq!(sub.sub("deeper").unwrap().unwrap().usize("m").unwrap(), Some(4));
    assert!(config.sub("absent").unwrap().is_none());
}

/// Python's words for numbers that are not finite are looked for outside of texts, whatever those hold.
#[test]
fn quotes_in_texts_do_not_end_them() {
    let config = open(r#"{"text": "say \"NaN\", or \\", "x": NaN, "\\\"-Infinity": 3}"#).unwrap();
    assert_eq!(config.str("text").unwrap(), Some(r#"say "NaN", or \"#));
    assert_eq!(config.usize(r#"\"-Infinity"#).unwrap(), Some(3));
    assert_eq!(config.str("x").unwrap(), Some("NaN"));
}

#[test]
fn values_that_cannot_be_meant() {
    let config = open(VALUES).unwrap();
    let says = |error: moe_runner::Error, wanted: &str| {
        let message = one_line(error, "config.json");
        assert!(message.contains(wanted), "{message}\n  should say: {wanted}");
    };
    says(config.usize("negative").unwrap_err(), "'negative': is -1; it must be an integer from 0");
    says(config.usize("float").unwrap_err(), "'float': is 8.0; it must be an integer");
    says(config.usize("text").unwrap_err(), "'text': is \"8");
    says(config.usize("large").unwrap_err(), "'large': is 99999999999; it must be");
    says(config.usize("yes").unwrap_err(), "'yes': is true");
    says(config.usize("list").unwrap_err(), "'list': is a list of 2; it must be");
    says(config.f32("nan").unwrap_err(), "'nan': is \"NaN\"; it must be a finite number");
    says(config.f32("big").unwrap_err(), "'big': is 1e+300; it must be a finite number");
    says(
        config.f32_list("limits").unwrap_err(),
        "'limits': is a list of 3; it must be a list of finite",
    );
    says(config.bool("n").unwrap_err(), "'n': is 8; it must be true or false");
    says(config.str("n").unwrap_err(), "'n': is 8; it must be a string");
    says(config.usize_list("mixed").unwrap_err(), "it must be a list of integers");
    says(config.str_list("mixed").unwrap_err(), "it must be a list of strings");
    says(config.sub("n").unwrap_err(), "'n': is 8; it must be an object");
    says(config.sub("sub").unwrap().unwrap().usize("bad").unwrap_err(), "'sub.bad': is \"x\"");
    says(config.usize("sub.bad").unwrap_err(), "'sub.bad': is \"x\"");
    says(config.sub("sub").unwrap().unwrap().missing("m"), "'sub.m': is missing");
}
