//! The book and the README: every command in them runs, and succeeds.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::case;
use crate::files::{New, Values, write};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn text(path: &str) -> String {
    let path = repository().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The commands of a page: lines in `console` blocks after `$ `, with those that they go on in.
fn commands(page: &str) -> Vec<String> {
    let mut commands: Vec<String> = Vec::new();
    let (mut inside, mut goes_on) = (false, false);
    for line in page.lines() {
        if line.starts_with("```") {
            (inside, goes_on) = (line == "```console", false);
        } else if inside && goes_on {
            let last = commands.last_mut().unwrap();
            last.push('\n');
            last.push_str(line);
            goes_on = line.ends_with('\\');
        } else if inside && let Some(command) = line.strip_prefix("$ ") {
            commands.push(command.to_owned());
            goes_on = line.ends_with('\\');
        }
    }
    commands
}

/// A folder with what the pages speak of.
fn desk() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let copy = |case: &Path, name: &str| {
        std::fs::create_dir(folder.path().join(name)).unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(case.join(file), folder.path().join(name).join(file)).unwrap();
        }
    };
    let qwen = case("qwen2_moe_f16");
    copy(&qwen, "model");
    copy(&case("olmoe_f16"), "OLMoE-1B-7B");
    std::fs::copy(qwen.join("golden.safetensors"), folder.path().join("recorded.safetensors"))
        .unwrap();
    let recorded = Values::read(&qwen.join("golden.safetensors"));
    // what the page's second command writes, where there is a transformers to ask
    let said = repository().join("crates/moe-acid/tests/said/mixtral-f32.json");
    std::fs::copy(said, folder.path().join("said.json")).unwrap();
    let x: Vec<f32> = recorded.get("layers.0.t7.x").iter().map(|v| *v as f32).collect();
    write(&folder.path().join("in.safetensors"), &[New::f32("hidden_states", &[7, 64], &x)]);
    folder
}

pub(crate) fn has_mpirun() -> bool {
    Command::new("mpirun").arg("--version").output().is_ok_and(|output| output.status.success())
}

/// Runs the commands of a page, one after the other, in one folder.
#[cfg(unix)]
fn run(page: &str) {
    let folder = desk();
    let tool = Path::new(env!("CARGO_BIN_EXE_moe-runner"));
    let tools = tool.parent().unwrap().to_str().unwrap();
    let path = format!("{tools}:{}", std::env::var("PATH").unwrap());
    let commands = commands(&text(page));
    assert!(commands.iter().any(|command| command.contains("moe-runner")), "{page}: no command");
    for command in commands {
        // what builds this program, asks another one, or needs what not every machine has
        let others = ["cargo ", "pip ", "python ", "python3 "];
        let others =
            others.iter().any(|other| command.starts_with(other)) || command.contains("--url http");
        if others || command.starts_with("mpirun ") && !has_mpirun() {
            eprintln!("SKIPPED: {command}");
            continue;
        }
        // a large model's shape: one row is enough
        let few = if command.contains("--preset") { "--tokens 1" } else { "" };
        let command = match command.split_once("  #") {
            Some((command, _)) => format!("{command} {few}"),
            None => format!("{command} {few}"),
        };
        let output = Command::new("sh")
            .args(["-ec", &command])
            .current_dir(folder.path())
            .env("PATH", &path)
            // Open MPI: as whoever runs the tests, on as few cores as there are
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            .env("OMPI_MCA_rmaps_base_oversubscribe", "1")
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{page}: {command}\n{stderr}");
    }
}

#[cfg(unix)]
#[test]
fn the_commands_of_the_book_run() {
    for page in pages() {
        let page = format!("docs/{page}");
        if !commands(&text(&page)).is_empty() {
            run(&page);
        }
    }
}

#[cfg(unix)]
#[test]
fn the_commands_of_the_readme_run() {
    run("README.md");
}

/// The book's pages.
fn pages() -> Vec<String> {
    let mut pages: Vec<String> = std::fs::read_dir(repository().join("docs"))
        .unwrap()
        .map(|item| item.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".md") && name != "SUMMARY.md")
        .collect();
    pages.sort();
    pages
}

/// The summary leads to every page, and every page is in it.
#[test]
fn the_summary_is_complete() {
    let summary = text("docs/SUMMARY.md");
    let pages = pages();
    for page in &pages {
        assert!(summary.contains(&format!("({page})")), "{page} is not in the summary");
    }
    assert_eq!(summary.matches(".md)").count(), pages.len());
    // and links between pages lead somewhere
    for page in pages {
        let text = text(&format!("docs/{page}"));
        for link in text.split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            let file = link.split('#').next().unwrap();
            if !link.contains("://") && !file.is_empty() {
                let target = repository().join("docs").join(file);
                assert!(target.exists(), "{page}: {link} leads nowhere");
            }
        }
    }
}

/// The example is one, in the repository's README and in the crate's, where it is compiled.
#[test]
fn the_readmes_example_is_the_one_that_is_compiled() {
    let of_crate = text("crates/moe-runner/README.md");
    let start = of_crate.find("```rust,no_run\n").unwrap();
    let end = start + of_crate[start + 8..].find("```\n").unwrap() + 8;
    assert!(text("README.md").contains(&of_crate[start..end]));
}

/// What the program carries is the recorded case that the library is tested with.
#[test]
fn the_built_in_checkpoint_is_the_recorded_one() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("builtin");
    let case = case("deepseek_v3_bf16");
    for (name, recorded) in [
        ("config.json", "config.json"),
        ("model.safetensors", "model.safetensors"),
        ("recorded.safetensors", "golden.safetensors"),
    ] {
        let same =
            std::fs::read(own.join(name)).unwrap() == std::fs::read(case.join(recorded)).unwrap();
        assert!(same, "{name} differs from {recorded}");
    }
}

#[test]
fn the_citation_is_of_this_version() {
    let citation = text("CITATION.cff");
    assert!(citation.contains(&format!("version: {}\n", env!("CARGO_PKG_VERSION"))), "{citation}");
}
