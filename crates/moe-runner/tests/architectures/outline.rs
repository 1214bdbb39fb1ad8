//! What a checkpoint is, without a look at what it holds.
#![cfg(target_os = "linux")] // elsewhere a mapped file cannot be shortened

use std::fs::File;
use std::path::Path;

use moe_runner::checkpoint::Checkpoint;
use moe_runner::checkpoint::architecture;
use moe_runner::doctor;
use moe_runner::weights::{LoadedLayer, Matrix, survey};

/// Where the first page begins that holds nothing but tensors, in a safetensors or a GGUF file.
fn end_of_header(file: &Path) -> u64 {
    const PAGE: u64 = 1 << 16;
    let bytes = std::fs::read(file).unwrap();
    let header = match bytes.starts_with(b"GGUF") {
        // generous: the tables of these files are smaller
        true => 48 << 10,
        false => 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()),
    };
    header.next_multiple_of(PAGE)
}

/// All of `inspect` by headers, on files whose tensors are gone by then: to read one number of them, be it
/// a weight's or a scale's, would end this process.
#[test]
fn an_outline_reads_no_tensor() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut bytes_left = 0;
    for name in [
        "deepseek_v3_bf16",
        "qwen2_moe_f16",
        "quant_qwen3_moe_fp8_block",
        "quant_qwen3_moe_fp8_static",
        "quant_qwen3_moe_gptq_g128",
        "quant_qwen3_moe_nvfp4",
        "quant_qwen3_moe_w4a16_asym",
        "gpt_oss_mxfp4",
        "gguf_qwen3moe_q4_k_m",
    ] {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(golden.join(name)).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().is_some_and(|name| name != "golden.safetensors") {
                std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
            }
        }
        let gguf = folder.path().join("model.gguf");
        let (path, file) = match gguf.exists() {
            true => (gguf.clone(), gguf),
            false => (folder.path().to_owned(), folder.path().join("model.safetensors")),
        };
        let checkpoint = Checkpoint::open_outline(&path).unwrap();
        let (end, all) = (end_of_header(&file), std::fs::metadata(&file).unwrap().len());
        assert!(end < all, "{name}: {all} bytes are not enough for this test");
        bytes_left += all - end;
        File::options().write(true).open(&file).unwrap().set_len(end).unwrap();
        assert!(architecture::overlooked(&checkpoint).unwrap().is_empty(), "{name}");
        for entry in architecture::layers(&checkpoint).unwrap() {
            let (layer, accounting) = survey(&checkpoint, &entry);
            assert!(layer.is_some() && accounting.is_complete(), "{name}: {accounting:?}");
            assert_eq!(doctor::formats(&checkpoint, &entry), [], "{name}");
        }
        assert_eq!(doctor::files(&checkpoint), [], "{name}");
    }
    assert!(bytes_left > 1 << 20, "{bytes_left} bytes were there to read");
}

/// Before a checkpoint is fetched its configuration tells what experts will be stored as: the files turn out to
/// hold these formats and shapes, and about as many bytes (a scale's type is no part of every configuration).
#[test]
fn a_configuration_tells_what_the_files_turn_out_to_hold() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut compared = 0;
    for entry in std::fs::read_dir(golden).unwrap() {
        let path = entry.unwrap().path();
        let config = path.join("config.json");
        if !config.exists() {
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(config, folder.path().join("config.json")).unwrap();
        let outline = Checkpoint::open_outline(folder.path()).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let promised = architecture::layers(&outline).unwrap();
        for (index, entry) in architecture::layers(&checkpoint).unwrap().iter().enumerate() {
            let place = format!("{}, layer {index}", path.display());
            let layer = LoadedLayer::load(&checkpoint, entry).unwrap();
            let (promised, accounting) = survey(&outline, &promised[index]);
            assert!(accounting.is_complete(), "{place}: {accounting:?}");
            let promised = promised.unwrap_or_else(|| panic!("{place}"));
            for (real, promised) in layer.experts.iter().zip(&promised.experts) {
                let real = real.gate.iter().chain([&real.up, &real.down]);
                let promised = promised.gate.iter().chain([&promised.up, &promised.down]);
                for (real, promised) in real.zip(promised) {
                    let told = |matrix: &Matrix| (matrix.format(), matrix.rows(), matrix.cols());
                    assert_eq!(told(promised), told(real), "{place}");
                    let [real, promised] = [real, promised].map(Matrix::stored_bytes);
                    assert!(promised.abs_diff(real) <= real / 8, "{place}: {promised} of {real}");
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 100, "{compared}");
}
