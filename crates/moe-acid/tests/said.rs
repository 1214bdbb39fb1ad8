//! What transformers said of the checkpoints, as it is and with faults put into its own classes
//! (`said/make.py`): the verdict is the one that stands in each file.

use std::fs;
use std::path::Path;

use moe_acid::{Decoder, ReadingsFile};

#[test]
fn recorded_engines_are_judged_as_they_were_made() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/said");
    let (mut right, mut faulty) = (0, 0);
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
        let expected = expected["expected"].as_str().unwrap();
        let file: ReadingsFile = serde_json::from_str(&text).unwrap();
        let (block, readings) = file.read().unwrap();
        let verdict = Decoder::new(&block).verdict(&readings);
        match expected {
            "right" => {
                assert!(verdict.is_right(), "{}: {verdict}", path.display());
                right += 1;
            }
            fault => {
                let faults = verdict.faults();
                assert_eq!(faults.len(), 1, "{}: {verdict}", path.display());
                assert!(faults[0].starts_with(fault), "{}: {verdict}", path.display());
                faulty += 1;
            }
        }
    }
    assert_eq!((right, faulty), (8, 22));
}
