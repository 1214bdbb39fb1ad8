//! `report`: one page, with the numbers of the other commands.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use moe_runner::router::{LogicalId, Routing, Trace};
use moe_runner::spec::RouterSpec;
use roxmltree::{Document, Node, ParsingOptions};
use serde_json::Value;

use crate::{case, json, moe_runner, refused};

/// Runs the command, and reads what it wrote.
fn report(checkpoint: &Path, folder: &Path, flags: &[&str]) -> (Option<i32>, Value, String) {
    let page = folder.join("report.html");
    let mut args = vec!["report".into(), checkpoint.as_os_str().to_owned(), "--json".into()];
    args.extend(["--output".into(), page.clone().into_os_string()]);
    args.extend(flags.iter().map(std::ffi::OsString::from));
    let output = moe_runner(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let json = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{stderr}"));
    (output.status.code(), json, std::fs::read_to_string(page).unwrap())
}

/// The page as a tree; it is well-formed as XML, too.
fn parsed(page: &str) -> Document<'_> {
    let options = ParsingOptions { allow_dtd: true, ..ParsingOptions::default() };
    Document::parse_with_options(page, options).unwrap_or_else(|error| panic!("{error}\n{page}"))
}

/// The pictures, by their labels.
fn picture<'a>(document: &'a Document, label: &str) -> Node<'a, 'a> {
    let svg = |node: &Node| {
        node.has_tag_name("svg")
            && node.attribute("aria-label").is_some_and(|text| text.starts_with(label))
    };
    document.descendants().find(svg).unwrap_or_else(|| panic!("no picture of {label}"))
}

/// What is told where the pointer rests.
fn titles(node: Node) -> BTreeSet<String> {
    let titles = node.descendants().filter(|node| node.has_tag_name("title"));
    titles.map(|title| title.text().unwrap_or_default().to_owned()).collect()
}

/// A trace in which token `t` chooses experts from `t % 3` on.
fn trace(case: &Path, folder: &Path) -> PathBuf {
    let inspected = json(["inspect".as_ref(), case.as_os_str(), "--json".as_ref()]);
    let mut trace = Trace::new();
    for layer in inspected["layers"].as_array().unwrap() {
        let spec: RouterSpec = serde_json::from_value(layer["spec"]["router"].clone()).unwrap();
        let k = spec.top_k as u32;
        let ids = (0..100).flat_map(|t| (0..k).map(move |i| LogicalId(t % 3 + i))).collect();
        let routing = Routing::from_parts(spec.top_k, ids, vec![1.0; 100 * spec.top_k]).unwrap();
        trace.record(layer["name"].as_str().unwrap(), &spec, &routing).unwrap();
    }
    let file = folder.join("trace.safetensors");
    trace.save(&file).unwrap();
    file
}

#[test]
fn the_page_stands_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (status, _, page) = report(&case("qwen2_moe_f16"), folder.path(), &["--tokens", "4"]);
    assert_eq!(status, Some(0));
    let document = parsed(&page);
    for node in document.descendants().filter(|node| node.is_element()) {
        let name = node.tag_name().name();
        assert!(!["script", "link", "img", "iframe", "object", "use"].contains(&name), "{name}");
        for attribute in node.attributes() {
            let name = attribute.name();
            assert!(!["src", "href", "style"].contains(&name) && !name.starts_with("on"), "{name}");
        }
    }
    assert!(!page.contains("http") && !page.contains("@import"), "something from elsewhere");
    assert_eq!(page.matches("url(").count(), page.matches("url(#").count());
    // patterns that are pointed to are there
    for id in ["hatch", "cross"] {
        assert!(page.contains(&format!("url(#{id})")), "{id}");
        assert!(document.descendants().any(|node| node.attribute("id") == Some(id)), "{id}");
    }
    let width = |node: Node| node.attribute("viewBox").map(|text| text.to_owned());
    let pictures = document.descendants().filter(|node| node.attribute("role") == Some("img"));
    let boxes: Vec<_> = pictures.map(width).collect();
    assert!(boxes.len() >= 4 && boxes.iter().all(Option::is_some), "{boxes:?}");
}

/// Its numbers are those that the other commands print, and all of them are on the page.
#[test]
fn the_numbers_are_those_of_the_other_commands() {
    let case = case("qwen2_moe_f16");
    let folder = tempfile::tempdir().unwrap();
    let trace = trace(&case, folder.path());
    let trace = trace.to_str().unwrap();
    let flags = ["--tokens", "8", "--no-timing", "--trace", trace, "--ranks", "3"];
    let (status, report, page) = report(&case, folder.path(), &flags);
    assert_eq!(status, Some(0), "{}", report["check"]["verdict"]);
    let document = parsed(&page);

    let alone = |command: &str, flags: &[&str]| {
        let mut args = vec![command.into(), case.as_os_str().to_owned(), "--json".into()];
        args.extend(flags.iter().map(std::ffi::OsString::from));
        json(args)
    };
    assert_eq!(report["check"], alone("check", &["--tokens", "8", "--no-timing"]));
    assert_eq!(report["plan"], alone("plan", &["--trace", trace, "--ranks", "3"]));
    assert_eq!(report["explain"], alone("explain", &[]));

    let load = titles(picture(&document, "Load of the experts"));
    let balance = titles(picture(&document, "Balance"));
    for layer in report["plan"]["layers"].as_array().unwrap() {
        let slots: Vec<u64> =
            layer["load"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
        // the trace as it was made: 100 tokens, four experts each
        assert_eq!(&slots[..7], &[34, 67, 100, 100, 66, 33, 0], "{layer}");
        for (expert, slots) in slots.iter().enumerate() {
            let unit = if *slots == 1 { "slot" } else { "slots" };
            let start = format!("layer {}, expert {expert}: {slots} {unit},", layer["layer"]);
            assert!(load.iter().any(|title| title.starts_with(&start)), "{start}: {load:?}");
        }
        let (before, after) =
            (layer["balance_before"].as_f64().unwrap(), layer["balance_after"].as_f64().unwrap());
        let title =
            format!("layer {}: balance {before:.3} before, {after:.3} after", layer["layer"]);
        assert!(balance.contains(&title), "{title}: {balance:?}");
    }
    let errors = titles(picture(&document, "Errors against the float64 reference"));
    for layer in report["check"]["layers"].as_array().unwrap() {
        let nmse = layer["nmse"].as_f64().unwrap();
        let start = format!("layer {}: NMSE {nmse:.1e}, bound ", layer["layer"]);
        assert!(errors.iter().any(|title| title.starts_with(&start)), "{start}: {errors:?}");
        let experts = layer["expert_nmse"].as_array().unwrap();
        let load = layer["load"].as_array().unwrap();
        assert_eq!(experts.len(), load.len());
        for (expert, (nmse, load)) in experts.iter().zip(load).enumerate() {
            assert_eq!(nmse.is_null(), load == 0, "{layer}");
            let told = match nmse.as_f64() {
                Some(nmse) => format!("NMSE {nmse:.1e}"),
                None => "no tokens".into(),
            };
            let title = format!("layer {}, expert {expert}: {told}", layer["layer"]);
            assert!(errors.contains(&title), "{title}: {errors:?}");
        }
        // the parts of the experts are those of the worst one, and sum up to the whole
        let worst = &layer["worst_expert"];
        assert_eq!(experts[worst["index"].as_u64().unwrap() as usize], worst["nmse"]);
    }
    for answer in report["explain"]["layers"].as_array().unwrap() {
        for kernel in [answer["able"].as_array(), answer["rejected"].as_array()] {
            for kernel in kernel.unwrap() {
                assert!(page.contains(kernel["kernel"].as_str().unwrap()), "{kernel}");
            }
        }
    }
    assert!(
        page.contains(report["check"]["verdict"].as_str().unwrap().split(" (").next().unwrap())
    );
}

/// Each run of `bench` is a point; what is none is refused.
#[test]
fn runs_of_bench_are_points() {
    let case = case("qwen2_moe_f16");
    let folder = tempfile::tempdir().unwrap();
    let bench = |name: &str, kernel: &str| {
        let mut args = vec!["bench".as_ref(), case.as_os_str(), "--json".as_ref()];
        args.extend(["--tokens", "1,5", "--kernel", kernel].map(std::ffi::OsStr::new));
        let file = folder.path().join(name);
        let bench = json(args);
        std::fs::write(&file, bench.to_string()).unwrap();
        (file.to_str().unwrap().to_owned(), bench)
    };
    let (first, one) = bench("one.json", "cpu_portable");
    let (second, two) = bench("two.json", "reference");
    let flags = ["--tokens", "2", "--no-timing", "--bench", &first, "--bench", &second];
    let (status, report, page) = report(&case, folder.path(), &flags);
    assert_eq!(status, Some(0));
    assert_eq!(report["bench"], Value::Array(vec![one.clone(), two.clone()]));
    let document = parsed(&page);
    let points = titles(picture(&document, "Roofline"));
    for bench in [one, two] {
        for row in bench["rows"].as_array().unwrap() {
            let (tokens, rate) = (row["tokens"].as_u64().unwrap(), row["gflops"].as_f64().unwrap());
            let unit = if tokens == 1 { "token" } else { "tokens" };
            let title = format!(
                "{}, {}: {tokens} {unit}, {rate:.1} GFLOP/s",
                bench["kernel"].as_str().unwrap(),
                bench["format"].as_str().unwrap()
            );
            assert!(points.iter().any(|point| point.starts_with(&title)), "{title}: {points:?}");
        }
    }

    let output = folder.path().join("other.html");
    let refuse = |file: &str| {
        let mut args = vec!["report".as_ref(), case.as_os_str(), "--bench".as_ref(), file.as_ref()];
        args.extend(["--output".as_ref(), output.as_os_str()]);
        let said = refused(1, args);
        assert!(!output.exists());
        said
    };
    std::fs::write(folder.path().join("three.json"), "{}").unwrap();
    let said = refuse(folder.path().join("three.json").to_str().unwrap());
    assert!(said.contains("is not what `bench --json` writes"), "{said}");
    let mut bad: Value = serde_json::from_slice(&std::fs::read(&first).unwrap()).unwrap();
    bad["limits"]["gflops"]["f32"] = (-1.0).into();
    std::fs::write(&first, bad.to_string()).unwrap();
    assert!(refuse(&first).contains("-1 is no rate"));
}

/// The picture of what quantisation lost, by expert.
#[test]
fn another_checkpoint_is_compared_with() {
    let case = case("qwen2_moe_f16");
    let folder = tempfile::tempdir().unwrap();
    let against = case.to_str().unwrap();
    let flags = ["--tokens", "4", "--no-timing", "--against", against];
    let (_, report, page) = report(&case, folder.path(), &flags);
    let document = parsed(&page);
    let lost = titles(picture(&document, "Errors against the other checkpoint"));
    // it is the same one: nothing is lost
    assert_eq!(report["check"]["layers"][0]["original_nmse"], 0.0);
    assert!(lost.iter().any(|title| title.ends_with(": NMSE 0.0e0")), "{lost:?}");
}

#[test]
fn what_is_wrong_is_on_the_page_and_in_the_status() {
    let folder = tempfile::tempdir().unwrap();
    let bad = folder.path().join("bad <b>");
    std::fs::create_dir(&bad).unwrap();
    let case = case("qwen2_moe_f16");
    std::fs::copy(case.join("config.json"), bad.join("config.json")).unwrap();
    let mut bytes = std::fs::read(case.join("model.safetensors")).unwrap();
    let length = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..length]).unwrap();
    let tensor = &header["model.layers.2.mlp.experts.5.down_proj.weight"]["data_offsets"];
    let at = |i: usize| length + tensor[i].as_u64().unwrap() as usize;
    bytes[at(0)..at(1)].fill(0);
    std::fs::write(bad.join("model.safetensors"), bytes).unwrap();
    let (status, report, page) = report(&bad, folder.path(), &["--tokens", "4", "--no-timing"]);
    assert_eq!(status, Some(1));
    assert_eq!(report["check"]["ok"], false);
    let document = parsed(&page);
    let text: String = document.descendants().filter_map(|node| node.text()).collect();
    assert!(
        text.contains("What is wrong") && text.contains("✗ WRONG: 1 of 2 MoE layers"),
        "{text}"
    );
    assert!(text.contains("expert 5: weights of zeros"), "{text}");
    // a name is a name, whatever it holds
    assert!(text.contains("bad <b>") && page.contains("bad &lt;b&gt;"));
}

/// What is read is never written; what was there stays until the new page is whole.
#[test]
fn inputs_are_never_the_output() {
    let case = case("qwen2_moe_f16");
    let folder = tempfile::tempdir().unwrap();
    let trace = trace(&case, folder.path());
    let before = std::fs::read(&trace).unwrap();
    let refuse = |status: i32, output: &Path, flags: &[&str]| {
        let mut args = vec!["report".as_ref(), case.as_os_str()];
        args.extend(["--output".as_ref(), output.as_os_str()]);
        args.extend(flags.iter().map(std::ffi::OsStr::new));
        refused(status, args)
    };
    let path = trace.to_str().unwrap();
    assert!(refuse(2, &trace, &["--trace", path]).contains("is the file of --trace"));
    assert_eq!(std::fs::read(&trace).unwrap(), before);
    assert!(refuse(2, &case.join("config.json"), &[]).contains("is a file of the checkpoint"));
    assert!(refuse(2, &case, &[]).contains("is the checkpoint itself"));
    assert!(refuse(1, folder.path(), &[]).contains("is no regular file"));
    assert!(refuse(1, &folder.path().join("no/such.html"), &[]).contains("cannot write"));

    let page = folder.path().join("old.html");
    std::fs::write(&page, "old").unwrap();
    refuse(2, &page, &["--layers", "7"]);
    assert_eq!(std::fs::read_to_string(&page).unwrap(), "old");
    let left: BTreeSet<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|item| item.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}
