//! GGUF files that lie.

use moe_runner::checkpoint::gguf::Value;
use moe_runner::checkpoint::{Checkpoint, Container, Dtype, StoredDtype};

use super::{one_line, read_all, refusal, write};

const FILE: &str = "model.gguf";

/// A GGUF file, part by part, each as the test wants it.
#[derive(Clone)]
pub(crate) struct Gguf {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    /// What the header says, where that is not the number of parts below.
    pub(crate) counts: Option<(u64, u64)>,
    pub(crate) pairs: Vec<Vec<u8>>,
    pub(crate) infos: Vec<Vec<u8>>,
    pub(crate) data: usize,
    pub(crate) alignment: usize,
}

impl Gguf {
    /// Two tensors: 'a' of shape [2, 32] in Q8_0, 'b' of shape [3] in F32.
    pub(crate) fn good() -> Self {
        let pairs = vec![pair("general.architecture", 8, &string(b"qwen3moe"))];
        let infos = vec![info("a", &[32, 2], 8, 0), info("b", &[3], 0, 96)];
        Self { magic: *b"GGUF", version: 3, counts: None, pairs, infos, data: 108, alignment: 32 }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.magic.to_vec();
        bytes.extend(self.version.to_le_bytes());
        let (tensors, pairs) =
            self.counts.unwrap_or((self.infos.len() as u64, self.pairs.len() as u64));
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(pairs.to_le_bytes());
        bytes.extend(self.pairs.concat());
        bytes.extend(self.infos.concat());
        bytes.resize(bytes.len().next_multiple_of(self.alignment), 0xee);
        bytes.extend((0..self.data).map(|i| i as u8));
        bytes
    }

    fn refused(&self, wanted: &str) {
        let message = refusal(FILE, &self.bytes());
        assert!(message.contains(wanted), "{message}\n  should say: {wanted}");
    }

    fn open(&self) -> Checkpoint {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), FILE, self.bytes());
        Checkpoint::open(folder.path().join(FILE)).unwrap()
    }
}

pub(crate) fn string(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes(), bytes].concat()
}

pub(crate) fn pair(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&string(key.as_bytes())[..], &kind.to_le_bytes(), value].concat()
}

pub(crate) fn array(kind: u32, len: u64, items: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &len.to_le_bytes(), items].concat()
}

pub(crate) fn info(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = string(name.as_bytes());
    bytes.extend((dims.len() as u32).to_le_bytes());
    bytes.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

#[test]
fn the_good_file_is_good() {
    for version in [2, 3] {
        let opened = Gguf { version, ..Gguf::good() }.open();
        assert_eq!(opened.container(), Container::Gguf);
        assert!(opened.config().is_none());
        let a = opened.require("a").unwrap();
        assert_eq!((a.dtype, &*a.shape, a.bytes.len()), (Dtype::Ggml(8), &[2, 32][..], 68));
        assert_eq!(opened.info("a").unwrap().dtype.to_string(), "Q8_0");
        let b = opened.require("b").unwrap();
        assert_eq!((b.dtype, &b.bytes[..4]), (Dtype::F32, &[96, 97, 98, 99][..]));
    }
}

#[test]
fn files_that_are_no_gguf() {
    Gguf { magic: *b"GGML", ..Gguf::good() }.refused("does not begin with 'GGUF'");
    Gguf { version: 1, ..Gguf::good() }.refused("is GGUF version 1");
    Gguf { version: 4, ..Gguf::good() }.refused("is GGUF version 4");
    Gguf { version: 3u32.swap_bytes(), ..Gguf::good() }.refused("big-endian");
    assert!(refusal(FILE, b"").contains("is empty"));
    assert!(refusal(FILE, b"GGUF").contains("4 bytes should follow, 0 are there"));
    Gguf { counts: Some((u64::MAX, 1)), ..Gguf::good() }.refused("tensors should follow");
    Gguf { counts: Some((2, u64::MAX)), ..Gguf::good() }.refused("key/values should follow");
}

/// Cut off anywhere, the file is refused, but for padding behind the last tensor.
#[test]
fn truncated_files() {
    let whole = Gguf::good().bytes();
    for len in 1..whole.len() {
        let message = refusal(FILE, &whole[..len]);
        assert!(
            ["should follow", "reach beyond", "does not begin"]
                .iter()
                .any(|why| message.contains(why)),
            "{len}: {message}"
        );
    }
}

#[test]
fn tensors_that_lie() {
    let with = |info: Vec<u8>| {
        let mut gguf = Gguf::good();
        gguf.infos[1] = info;
        gguf
    };
    with(info("b", &[3], 0, 100))
        .refused("tensor 'b': its offset 100 is no multiple of the alignment, 32");
    with(info("b", &[4], 0, 96))
        .refused("tensor 'b': its 16 bytes at offset 96 reach beyond the 108 bytes");
    with(info("b", &[3], 0, 128)).refused("tensor 'b': its 12 bytes at offset 128 reach beyond");
    with(info("b", &[3], 0, u64::MAX - 31)).refused("tensor 'b': its 12 bytes");
    with(info("b", &[3], 0, 64)).refused("tensor 'b': overlaps with 'a'");
    with(info("b", &[3], 0, 0)).refused("overlaps with");
    with(info("a", &[3], 0, 96)).refused("tensor 'a': stands more than once");
    with(info("b", &[33], 2, 96))
        .refused("tensor 'b': has rows of 33 elements; Q4_0 comes in blocks of 32");
    with(info("b", &[], 2, 96)).refused("tensor 'b': has rows of 1 elements");
    with(info("b", &[1 << 32, 1 << 32], 0, 96))
        .refused("tensor 'b': F32 of shape [4294967296, 4294967296]");
    with(info("b", &[u64::MAX], 0, 96)).refused("is larger than any file");
    with(info("b", &[1; 9], 0, 96)).refused("tensor 'b': has 9 dimensions");
    with(info("b\n", &[3], 0, 96)).refused(r"tensor 'b\n': has control characters");
    with(info(&"b".repeat(1025), &[3], 0, 96)).refused("has a name of 1025 bytes");
    let mut no_utf8 = info("b", &[3], 0, 96);
    no_utf8[8] = 0xff;
    with(no_utf8).refused("is no valid UTF-8");
    let mut endless = info("b", &[3], 0, 96);
    endless[..8].fill(0xff);
    with(endless).refused("18446744073709551615 bytes should follow");
}

#[test]
fn tensors_that_are_unusual_and_right() {
    let mut gguf = Gguf::good();
    gguf.infos =
        vec![info("none", &[0, 4], 0, 0), info("one", &[], 0, 0), info("odd", &[7], 77, 32)];
    let opened = gguf.open();
    assert!(opened.require("none").unwrap().bytes.is_empty());
    assert_eq!(opened.require("one").unwrap().bytes.len(), 4);
    let odd = StoredDtype::Unknown("ggml type 77".into());
    assert_eq!(*opened.info("odd").unwrap().dtype, odd);
    let message = one_line(opened.tensor("odd").unwrap_err(), FILE);
    assert!(message.contains("'odd': has the dtype 'ggml type 77'"), "{message}");
    read_all(&opened);
    Gguf { infos: vec![], data: 0, ..Gguf::good() }.open();
}

#[test]
fn metadata_of_every_type() {
    let mut gguf = Gguf::good();
    let strings = [string(b"x"), string(b"\xff"), string(b"")].concat();
    let nested = array(9, 2, &[array(0, 1, &[5]), array(5, 1, &(-6i32).to_le_bytes())].concat());
    gguf.pairs = vec![
        pair("u8", 0, &[200]),
        pair("i8", 1, &[0xff]),
        pair("u16", 2, &[1, 2]),
        pair("i16", 3, &(-2i16).to_le_bytes()),
        pair("u32", 4, &7u32.to_le_bytes()),
        pair("i32", 5, &(-3i32).to_le_bytes()),
        pair("f32", 6, &1.5f32.to_le_bytes()),
        pair("bool", 7, &[1]),
        pair("string", 8, &string("é".as_bytes())),
        pair("strings", 9, &array(8, 3, &strings)),
        pair("nested", 9, &nested),
        pair("u64", 10, &u64::MAX.to_le_bytes()),
        pair("i64", 11, &i64::MIN.to_le_bytes()),
        pair("f64", 12, &f64::NAN.to_le_bytes()),
        pair("list", 9, &array(4, 2, &[1, 0, 0, 0, 2, 0, 0, 0])),
    ];
    let opened = gguf.open();
    let metadata = opened.metadata().unwrap();
    assert_eq!(metadata.keys().count(), 15);
    assert_eq!(metadata.get("u8"), Some(Value::Unsigned(200)));
    assert_eq!(metadata.get("i8"), Some(Value::Signed(-1)));
    assert_eq!(metadata.get("u16"), Some(Value::Unsigned(513)));
    assert_eq!(metadata.get("i16"), Some(Value::Signed(-2)));
    assert_eq!(metadata.usize("u32").unwrap(), Some(7));
    assert_eq!(metadata.get("i32"), Some(Value::Signed(-3)));
    assert_eq!(metadata.f32("f32").unwrap(), Some(1.5));
    assert_eq!(metadata.bool("bool").unwrap(), Some(true));
    assert_eq!(metadata.str("string").unwrap(), Some("é"));
    assert_eq!(metadata.get("u64"), Some(Value::Unsigned(u64::MAX)));
    assert_eq!(metadata.get("i64"), Some(Value::Signed(i64::MIN)));
    assert_eq!(metadata.usize_list("list").unwrap(), Some(vec![1, 2]));
    assert_eq!(metadata.f32_list("list").unwrap(), Some(vec![1.0, 2.0]));
    let Some(Value::Array(strings)) = metadata.get("strings") else { panic!("an array") };
    let strings: Vec<_> = strings.iter().collect();
    assert_eq!(strings, ["x", "\u{fffd}", ""].map(|text| Value::String(text.into())));
    let Some(Value::Array(nested)) = metadata.get("nested") else { panic!("an array") };
    let Some(Value::Array(last)) = nested.iter().last() else { panic!("an array of arrays") };
    assert_eq!(last.iter().collect::<Vec<_>>(), [Value::Signed(-6)]);
    assert_eq!(metadata.get("absent"), None);
    assert_eq!(metadata.usize("absent").unwrap(), None);

    let says = |error: moe_runner::Error, wanted: &str| {
        let message = one_line(error, FILE);
        assert!(message.contains(wanted), "{message}\n  should say: {wanted}");
    };
    says(metadata.usize("i32").unwrap_err(), "'i32': is -3; it must be an integer from 0");
    says(metadata.usize("u64").unwrap_err(), "'u64': is 18446744073709551615");
    says(metadata.f32("f64").unwrap_err(), "'f64': is NaN; it must be a finite number");
    says(metadata.bool("u8").unwrap_err(), "'u8': is 200; it must be a truth value");
    says(metadata.str("list").unwrap_err(), "'list': is a list of 2; it must be a string");
    says(metadata.usize_list("strings").unwrap_err(), "'strings': is a list of 3");
    says(metadata.missing("k"), "'k': is missing");
}

#[test]
fn metadata_that_lies() {
    let with = |pair: Vec<u8>| {
        let mut gguf = Gguf::good();
        gguf.pairs.push(pair);
        gguf
    };
    with(pair("k", 13, &[0; 8])).refused("there is no value type 13");
    with(pair("k", 7, &[2])).refused("'k': byte");
    with(pair("k", 8, &u64::MAX.to_le_bytes())).refused("'k': byte");
    with(pair("k", 8, &string(b"\xff"))).refused("is no valid UTF-8");
    with(pair("k", 9, &array(4, u64::MAX, &[])))
        .refused("18446744073709551615 items should follow");
    with(pair("k", 9, &array(10, 1 << 61, &[]))).refused("items should follow");
    with(pair("k", 9, &array(8, 1 << 61, &[]))).refused("items should follow");
    with(pair("k", 9, &array(99, 1, &[0]))).refused("there is no value type 99");
    let deep = (0..6).fold(array(0, 0, &[]), |inner, _| array(9, 1, &inner));
    with(pair("k", 9, &deep)).refused("arrays are nested deeper than 4");
    with(pair("general.architecture", 0, &[1]))
        .refused("'general.architecture': stands more than once");
    with(pair("k\u{7}", 0, &[1])).refused(r"'k\u{7}' is no usable key");
    for alignment in [0u32, 3, 48, 1 << 21] {
        with(pair("general.alignment", 4, &alignment.to_le_bytes()))
            .refused("'general.alignment': is");
    }
    with(pair("general.alignment", 8, &string(b"32"))).refused("it must be an integer");
}

#[test]
fn alignment_is_what_the_file_says() {
    let mut gguf = Gguf::good();
    gguf.pairs.push(pair("general.alignment", 4, &8u32.to_le_bytes()));
    gguf.infos[1] = info("b", &[3], 0, 72);
    gguf.alignment = 8;
    let b = gguf.open().require("b").unwrap();
    assert_eq!((b.bytes.len(), b.bytes[0]), (12, 72));
    gguf.infos[1] = info("b", &[3], 0, 76);
    gguf.refused("no multiple of the alignment, 8");
}

/// Writes part `no` of `count`, with one tensor of its own.
fn part(folder: &std::path::Path, no: u16, count: u16) -> Gguf {
    let mut gguf = Gguf::good();
    gguf.pairs.push(pair("split.no", 2, &no.to_le_bytes()));
    gguf.pairs.push(pair("split.count", 2, &count.to_le_bytes()));
    gguf.pairs.push(pair("split.tensors.count", 5, &i32::from(count).to_le_bytes()));
    gguf.infos = vec![info(&format!("t{no}"), &[3], 0, 0)];
    write(folder, &part_name(no, count), gguf.bytes());
    gguf
}

fn part_name(no: u16, count: u16) -> String {
    format!("m-{:05}-of-{count:05}.gguf", no + 1)
}

#[test]
fn split_models() {
    let folder = tempfile::tempdir().unwrap();
    let path = |no| folder.path().join(part_name(no, 3));
    for no in 0..3 {
        part(folder.path(), no, 3);
    }
    let opened = Checkpoint::open(path(0)).unwrap();
    assert_eq!(opened.names().collect::<Vec<_>>(), ["t0", "t1", "t2"]);
    assert_eq!(opened.require("t2").unwrap().file, path(2));

    let says = |path: &std::path::Path, file: &str, wanted: &str| {
        let message = one_line(Checkpoint::open(path).unwrap_err(), file);
        assert!(message.contains(wanted), "{message}\n  should say: {wanted}");
    };
    says(&path(1), "m-00002-of-00003.gguf", "is part 2 of 3; open");
    std::fs::rename(path(0), folder.path().join("other.gguf")).unwrap();
    says(
        &folder.path().join("other.gguf"),
        "other.gguf",
        "its name must end in '-00001-of-00003.gguf'",
    );
    std::fs::rename(folder.path().join("other.gguf"), path(0)).unwrap();
    std::fs::copy(path(1), path(2)).unwrap();
    says(&path(0), "m-00003-of-00003.gguf", "does not say of itself that it is part 3 of 3");
    std::fs::remove_file(path(2)).unwrap();
    says(&path(0), "m-00003-of-00003.gguf", "cannot open");
    let mut two = part(folder.path(), 2, 3);
    two.infos.push(info("t3", &[3], 0, 32));
    write(folder.path(), &part_name(2, 3), two.bytes());
    says(&path(0), "m-00001-of-00003.gguf", "'split.tensors.count': is 3, but the 3 parts hold 4");
    two.infos.pop();
    two.infos[0] = info("t1", &[3], 0, 0);
    write(folder.path(), &part_name(2, 3), two.bytes());
    let opened = Checkpoint::open(path(0)).unwrap();
    assert!(opened.require("t1").unwrap_err().to_string().contains("more than one file"));
}

/// Empty, but whoever multiplies the dimensions in another order would not see that.
#[test]
fn zeros_do_not_hide_absurd_dimensions() {
    for dims in [[0, 1 << 40, 1 << 40], [1 << 40, 1 << 40, 0], [1 << 40, 0, 1 << 40]] {
        let mut gguf = Gguf::good();
        gguf.infos[1] = info("b", &dims, 0, 96);
        let message = refusal(FILE, &gguf.bytes());
        assert!(message.contains("'b'"), "{message}");
    }
    let mut gguf = Gguf::good();
    gguf.infos[1] = info("b", &[0, 3, 1 << 40], 0, 96);
    assert!(gguf.open().require("b").unwrap().bytes.is_empty());
}
