//! `bench`: its report has the promised shape, and its arguments are checked.

use crate::{case, json, refused};

#[test]
fn a_checkpoints_layer_is_timed() {
    let case = case("qwen2_moe_f16");
    let mut args = vec!["bench".as_ref(), case.as_os_str()];
    args.extend(["--layer", "2", "--tokens", "1,3", "--json"].map(std::ffi::OsStr::new));
    let report = json(args);
    let limits = &report["limits"];
    let (read, compute) = (&limits["read_gbps"], &limits["gflops"]["f32"]);
    assert!(read.as_f64().unwrap() > 0.0 && compute.as_f64().unwrap() > 0.0, "{limits}");
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for (row, tokens) in rows.iter().zip([1, 3]) {
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} in {row}"));
        assert_eq!(row["tokens"], tokens);
        assert!(number("min_s") <= number("median_s") && number("median_s") <= number("max_s"));
        // shares follow from the rates and limits of the same report
        let share = (number("gbps") / read.as_f64().unwrap())
            .max(number("gflops") / compute.as_f64().unwrap());
        assert!((number("limit_share") / share - 1.0).abs() < 1e-6, "{row}");
    }
    // one token: 4 of 12 experts of 3 · 64 · 40 weights, and the shared expert, in f16, and the gate
    let bytes = rows[0]["bytes_weights_read"].as_f64().unwrap();
    let experts = (4 * 3 * 64 * 40 + 3 * 64 * 72) as f64 * 2.0;
    assert!((experts..=experts + 12.0 * 64.0 * 4.0).contains(&bytes), "{bytes}, {experts}");
}

/// Two ranks with whole experts: every row goes to the other rank where an expert of it lives.
#[test]
fn a_split_layer_is_timed() {
    let case = case("qwen2_moe_f16");
    let mut args = vec!["bench".as_ref(), case.as_os_str()];
    let flags = ["--layer", "2", "--tokens", "1,4", "--dp", "2", "--ep", "--json"];
    args.extend(flags.map(std::ffi::OsStr::new));
    let report = json(args);
    assert_eq!(report["split"]["dp"], 2);
    assert_eq!(report["split"]["expert_parallel"], true);
    for row in report["rows"].as_array().unwrap() {
        // a row of 64 f16 values goes there, and no more than k of them come back in f32
        let moved = row["bytes_moved_per_token"].as_f64().unwrap();
        assert!((1.0..=64.0 * 2.0 + 4.0 * 64.0 * 4.0 + 1000.0).contains(&moved), "{row}");
        assert!(row["median_s"].as_f64().unwrap() > 0.0);
        // more tokens do not make them read less
        assert!(row["bytes_weights_read"].as_f64().unwrap() > 4.0 * 3.0 * 64.0 * 40.0 * 2.0);
    }
}

/// A measurement stands beside an earlier one of the same layer, and beside no other.
#[test]
fn times_are_compared_with_earlier_ones() {
    let folder = tempfile::tempdir().unwrap();
    let earlier = folder.path().join("before.json");
    let case = case("qwen2_moe_f16");
    let case = case.to_str().unwrap();
    let picture = folder.path().join("times.svg");
    let svg = picture.to_str().unwrap();
    let mut before =
        json(["bench", case, "--layer", "2", "--tokens", "1,3", "--svg", svg, "--json"]);
    let picture = std::fs::read_to_string(picture).unwrap();
    assert!(picture.starts_with("<svg xmlns") && picture.contains("memory allows"), "{picture}");
    // small weights stay in any cache
    assert_eq!(before["cached"], true);
    let row = &mut before["rows"][1];
    let (median, quartiles) = (row["median_s"].as_f64().unwrap(), row["quartiles_s"].clone());
    assert!(quartiles[0].as_f64().unwrap() <= median && median <= quartiles[1].as_f64().unwrap());
    // as if it had taken a thousand times as long
    row["median_s"] = (1e3 * median).into();
    row["quartiles_s"] = [0, 1].map(|i| 1e3 * quartiles[i].as_f64().unwrap()).to_vec().into();
    std::fs::write(&earlier, before.to_string()).unwrap();
    let earlier = earlier.to_str().unwrap();
    let with = |layer, tokens| {
        vec!["bench", case, "--layer", layer, "--tokens", tokens, "--compare", earlier]
    };
    let compared = &json([with("2", "3,4"), vec!["--json"]].concat())["compared"];
    let rows = compared["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 1, "4 tokens were not measured then: {compared}");
    assert_eq!((&rows[0]["tokens"], &rows[0]["beyond_noise"]), (&3.into(), &true.into()));
    assert!((10.0..1e5).contains(&rows[0]["speed"].as_f64().unwrap()), "{compared}");
    assert!(refused(2, with("0", "3")).contains("another layer"));
    assert!(refused(2, with("2", "5")).contains("other numbers of tokens"));
    std::fs::write(earlier, "{}").unwrap();
    assert!(refused(2, with("2", "3")).contains("bench --json"));
}

#[test]
fn unusable_arguments() {
    let case = case("qwen2_moe_f16");
    let case = case.to_str().unwrap();
    for (args, says) in [
        (&["--preset", "gpt-5"][..], "qwen3-30b-a3b"),
        (&[], "presets are qwen3-30b-a3b"),
        (&["--preset", "qwen3-30b-a3b", "--format", "int3"], "f32, f16, bf16"),
        (&["--preset", "gpt-oss-20b", "--format", "q4_k"], "whole blocks"),
        (&["--preset", "qwen3-30b-a3b", "--sequence-parallel"], "expert parallel"),
        (&["--preset", "qwen3-30b-a3b", "--dp", "0"], "at least 1"),
        (&["--preset", "qwen3-30b-a3b", "--tokens", "0"], "--tokens"),
        (&["--preset", "qwen3-30b-a3b", "--tokens", "1,x"], "--tokens"),
        (&["--preset", "qwen3-30b-a3b", "--layer", "1"], "--layer"),
        (&[case, "--preset", "qwen3-30b-a3b"], "--preset"),
        (&[case, "--format", "bf16"], "--format"),
        (&[case, "--layer", "1"], "layer 1 is no MoE layer"),
        (&[case, "--layer", "all"], "one layer"),
    ] {
        let stderr = refused(2, [&["bench"][..], args].concat());
        assert!(stderr.contains(says), "{stderr:?} should say {says:?}");
    }
}
