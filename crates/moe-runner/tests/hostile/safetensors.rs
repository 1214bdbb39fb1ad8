//! Safetensors headers that lie.

use moe_runner::checkpoint::{Checkpoint, Dtype, StoredDtype};

use super::{one_line, read_all, refusal, safetensors_bytes};

const FILE: &str = "model.safetensors";

/// A header of one F32 tensor 'a' of shape [2].
const GOOD: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

fn check(header: &str, data: usize, wanted: &str) {
    let message = refusal(FILE, &safetensors_bytes(header, data));
    assert!(message.contains(wanted), "{message}\n  should say: {wanted}\n  for {header:.200}");
}

#[test]
fn the_good_header_is_good() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    std::fs::write(&path, safetensors_bytes(GOOD, 8)).unwrap();
    let opened = Checkpoint::open_safetensors(&path).unwrap();
    assert_eq!(*opened.require("a").unwrap().bytes, [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn files_that_are_no_safetensors() {
    let says = |bytes: &[u8], wanted: &str| {
        let message = refusal(FILE, bytes);
        assert!(message.contains(wanted), "{message}\n  should say: {wanted}");
    };
    says(b"", "is empty");
    says(b"1234567", "has 7 bytes");
    says(b"garbage garbage garbage", "is no safetensors file");
    says(&[0; 64], "is no JSON object");
    says(&u64::MAX.to_le_bytes(), "18446744073709551615 bytes; the limit is 100000000");
    says(&100_000_001u64.to_le_bytes(), "the limit is 100000000");
    says(&100_000_000u64.to_le_bytes(), "ends within its header");
    says(&safetensors_bytes(GOOD, 8)[..30], "ends within its header");
    says(&safetensors_bytes("[1]", 0), "is no JSON object");
}

#[test]
fn headers_that_are_no_table_of_tensors() {
    check(r#"{"a":{"dtype":"F32""#, 0, "tensor 'a': its entry in the header is bad: EOF");
    check("{\"a\\uZZ\"", 0, "bad header");
    check(r#"{"a":1}"#, 0, "tensor 'a': its entry");
    check(r#"{"a":{}}"#, 0, "missing field `dtype`");
    check(r#"{"a":{"dtype":"F32","dtype":"F32"}}"#, 0, "duplicate field `dtype`");
    check(r#"{"a":{"dtype":7}}"#, 0, "tensor 'a': its entry");
    check(r#"{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#, 8, "tensor 'a': its entry");
    check(
        r#"{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}"#,
        8,
        "tensor 'a': its entry",
    );
    check(r#"{"a":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,8]}}"#, 8, "'a'");
    check(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0]}}"#, 8, "tensor 'a': its entry");
    check(
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}"#,
        8,
        "tensor 'a': its entry",
    );
    check(
        r#"{"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]}}"#,
        8,
        "8 dimensions",
    );
    check(&format!("{GOOD}x"), 8, "bad header: trailing characters");
    let deep = format!(r#"{{"a":{{"dtype":"F32","shape":{}"#, "[".repeat(100_000));
    check(&deep, 0, "tensor 'a': its entry");
    let deep = format!(r#"{{"__metadata__":{}"#, r#"{"a":"#.repeat(100_000));
    check(&deep, 0, "bad header: EOF");
    let mut no_utf8 = safetensors_bytes(GOOD, 8);
    no_utf8[10] = 0xff;
    assert!(refusal(FILE, &no_utf8).contains("bad header"));
}

#[test]
fn names_that_are_no_names() {
    check(
        r#"{"a\nb":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
        8,
        r"'a\nb': has control characters",
    );
    let long =
        format!(r#"{{"{}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}"#, "n".repeat(1025));
    check(&long, 8, "has a name of 1025 bytes");
    let twice = format!("{},{}", &GOOD[..GOOD.len() - 1], &GOOD[1..]);
    check(&twice, 8, "tensor 'a': overlaps with 'a'");
    // Not even where both could be.
    let twice = twice.replacen("[0,8]", "[8,16]", 1);
    check(&twice, 16, "tensor 'a': stands more than once");
}

#[test]
fn offsets_that_lie() {
    let two = |a: &str, b: &str| {
        format!(
            r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{a}}},"b":{{"dtype":"U8","shape":[4],"data_offsets":{b}}}}}"#
        )
    };
    check(&two("[0,4]", "[2,6]"), 6, "tensor 'b': overlaps with 'a'");
    check(&two("[4,8]", "[4,8]"), 8, "tensor '");
    check(&two("[0,4]", "[5,9]"), 9, "tensor 'b': 1 bytes before it belong to no tensor");
    check(&two("[1,5]", "[5,9]"), 9, "tensor 'a': 1 bytes before it");
    check(&two("[0,4]", "[4,8]"), 9, "1 bytes at its end belong to no tensor");
    check(
        &two("[0,4]", "[4,8]"),
        7,
        "tensor 'b': its data_offsets [4, 8] reach beyond the 7 bytes",
    );
    check(&two("[4,0]", "[4,8]"), 8, "tensor 'a': its data_offsets [4, 0] run backwards");
    check(&two("[0,4]", "[4,18446744073709551615]"), 8, "tensor 'b': its data_offsets");
    check(&two("[0,4]", "[18446744073709551612,18446744073709551615]"), 8, "tensor 'b'");
    check("{}", 1, "1 bytes at its end belong to no tensor");
}

#[test]
fn sizes_that_lie() {
    let shape =
        |shape: &str| format!(r#"{{"a":{{"dtype":"BF16","shape":{shape},"data_offsets":[0,8]}}}}"#);
    check(&shape("[3]"), 8, "tensor 'a': has 8 bytes; BF16 of shape [3] needs 6");
    check(&shape("[]"), 8, "needs 2");
    check(&shape("[4,0]"), 8, "needs 0");
    check(&shape("[4294967296,4294967296]"), 8, "needs more than any file can hold");
    check(&shape("[9223372036854775812]"), 8, "needs more than any file can hold");
}

/// Offsets in another order than names, tensors without elements, and scalars are all right.
#[test]
fn unusual_files_that_are_right() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    let header = r#"{"__metadata__":{"a":"b"},
        "b":{"dtype":"I64","shape":[],"data_offsets":[0,8]},
        "z":{"dtype":"F32","shape":[0,3],"data_offsets":[8,8]},
        "a":{"dtype":"U8","shape":[2],"data_offsets":[8,10],"more":[1,{}]}}   "#;
    std::fs::write(&path, safetensors_bytes(header, 10)).unwrap();
    let opened = Checkpoint::open_safetensors(&path).unwrap();
    assert_eq!(opened.names().collect::<Vec<_>>(), ["a", "b", "z"]);
    assert_eq!(*opened.require("a").unwrap().bytes, [8, 9]);
    assert_eq!(opened.require("b").unwrap().to_i64().unwrap(), [0x0706_0504_0302_0100]);
    assert!(opened.require("z").unwrap().bytes.is_empty());
    assert!(opened.tensor("c").unwrap().is_none());

    std::fs::write(&path, safetensors_bytes("{}", 0)).unwrap();
    assert_eq!(Checkpoint::open_safetensors(&path).unwrap().names().count(), 0);
}

/// A dtype that we cannot read matters only to who asks for that tensor.
#[test]
fn unknown_dtypes_are_listed_and_refused_when_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    for dtype in ["F4", "F6_E2M3", "F6_E3M2", "C64", "F8_E4M3FNUZ", "f32", "F33\\n"] {
        let header = format!(
            r#"{{"a":{{"dtype":"{dtype}","shape":[2],"data_offsets":[0,8]}},
                "b":{{"dtype":"F8_E8M0","shape":[2],"data_offsets":[8,10]}}}}"#
        );
        std::fs::write(&path, safetensors_bytes(&header, 10)).unwrap();
        let opened = Checkpoint::open_safetensors(&path).unwrap();
        let info = opened.info("a").unwrap();
        assert_eq!((info.dtype, info.bytes), (&StoredDtype::Unknown(dtype.into()), 8));
        let message = one_line(opened.require("a").unwrap_err(), FILE);
        assert!(message.contains(&format!("tensor 'a': has the dtype '{dtype}'")), "{message}");
        assert_eq!(opened.require("b").unwrap().dtype, Dtype::F8E8M0);
        read_all(&opened);
    }
}

/// Names of dtypes, byte by byte those of the format's own crate.
#[test]
fn every_known_dtype_is_read_under_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(FILE);
    let known = [
        (Dtype::Bool, safetensors::Dtype::BOOL),
        (Dtype::U8, safetensors::Dtype::U8),
        (Dtype::I8, safetensors::Dtype::I8),
        (Dtype::U16, safetensors::Dtype::U16),
        (Dtype::I16, safetensors::Dtype::I16),
        (Dtype::U32, safetensors::Dtype::U32),
        (Dtype::I32, safetensors::Dtype::I32),
        (Dtype::U64, safetensors::Dtype::U64),
        (Dtype::I64, safetensors::Dtype::I64),
        (Dtype::F16, safetensors::Dtype::F16),
        (Dtype::Bf16, safetensors::Dtype::BF16),
        (Dtype::F32, safetensors::Dtype::F32),
        (Dtype::F64, safetensors::Dtype::F64),
        (Dtype::F8E4M3, safetensors::Dtype::F8_E4M3),
        (Dtype::F8E5M2, safetensors::Dtype::F8_E5M2),
        (Dtype::F8E8M0, safetensors::Dtype::F8_E8M0),
    ];
    for (ours, theirs) in known {
        let data = vec![1; 3 * theirs.bitsize() / 8];
        let view = safetensors::tensor::TensorView::new(theirs, vec![3], &data).unwrap();
        std::fs::write(&path, safetensors::serialize([("t", view)], None).unwrap()).unwrap();
        let opened = Checkpoint::open_safetensors(&path).unwrap();
        assert_eq!(opened.require("t").unwrap().dtype, ours);
        assert_eq!(ours.to_string(), theirs.to_string());
    }
}

/// Empty, but whoever multiplies the dimensions in another order would not see that.
#[test]
fn zeros_do_not_hide_absurd_dimensions() {
    let huge = 1u64 << 40;
    let header =
        format!(r#"{{"a":{{"dtype":"U8","shape":[0,{huge},{huge}],"data_offsets":[0,0]}}}}"#);
    let message = refusal("m.safetensors", &safetensors_bytes(&header, 0));
    assert!(message.contains("which no array can have"), "{message}");
}
