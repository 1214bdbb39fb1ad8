//! `acid`: checkpoints for any engine, and what its log-probabilities mean.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;

use serde_json::{Value, json};

use crate::{json, moe_runner, refused};

fn said(name: &str) -> String {
    format!("{}/../moe-acid/tests/said/{name}.json", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn every_kernel_of_this_program_is_right_in_every_form() {
    for kernel in ["auto", "reference"] {
        let said = json(["acid", "run", "--json", "--kernel", kernel, "--threads", "2"]);
        assert_eq!(said["ok"], true, "{said:#}");
        // seven checkpoints in six forms, gpt-oss in three; and in five of GGUF
        assert_eq!(said["checkpoints"].as_array().unwrap().len(), 7 * 6 - 3 + 7 * 5);
    }
}

#[test]
fn a_written_checkpoint_is_one_that_every_command_reads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let args = ["acid", "write", path, "--family", "mixtral,llama4", "--form", "bf16", "--json"];
    let written = json(args);
    let written = written["written"].as_array().unwrap();
    assert_eq!(written.len(), 2);
    for checkpoint in written {
        let inspected = json(["inspect", checkpoint.as_str().unwrap(), "--json"]);
        assert_eq!(inspected["layers"].as_array().unwrap().len(), 1);
    }
    assert!(refused(2, args).contains("is there already"));
    assert!(refused(2, ["acid", "write", path, "--family", "bert"]).contains("mixtral"));
}

#[test]
fn a_verdict_decides_the_status_and_names_the_fault() {
    let (right, faulty) = (said("mixtral-f32"), said("mixtral-f32-swap"));
    assert_eq!(json(["acid", "read", &right, "--json"])["ok"], true);
    let output = moe_runner(["acid", "read", &right, &faulty]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("gate and up swapped") && text.contains("right"), "{text}");
    assert!(text.contains("transformers"), "{text}");
    let table = moe_runner(["acid", "read", &faulty, "--table"]);
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(text.contains("read (expected)"), "{text}");
    let other = env!("CARGO_MANIFEST_DIR").to_owned() + "/Cargo.toml";
    assert!(refused(1, ["acid", "read", &other]).contains("is not what an engine said"));
}

#[test]
fn every_known_mistake_is_named() {
    let proof = json(["acid", "self", "--json"]);
    assert_eq!(proof["ok"], true, "{proof:#}");
    assert!(proof["mistakes"].as_u64() > Some(80), "{proof:#}");
    assert_eq!(proof["mistakes"], proof["named"]);
}

/// A server at an address of its own: answers each request, a path and a body, as `answer` says.
fn server(answer: impl Fn(&str, &Value) -> (u16, Value) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            let mut lines = stream.by_ref().lines().map(Result::unwrap);
            let first = lines.next().unwrap();
            let header: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
            let length = header.iter().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().unwrap())
            });
            let mut body = vec![0; length.unwrap_or(0)];
            stream.read_exact(&mut body).unwrap();
            let body = serde_json::from_slice(&body).unwrap_or_default();
            let (status, json) = answer(first.split(' ').nth(1).unwrap(), &body);
            let json = json.to_string();
            let (one, two) = json.split_at(json.len() / 2);
            // in chunks, as servers may
            let chunk = |part: &str| format!("{:x}\r\n{part}\r\n", part.len());
            let all = [one, two, ""].map(chunk).concat();
            let head = "Content-Type: application/json\r\nTransfer-Encoding: chunked";
            let _ = write!(stream.get_mut(), "HTTP/1.1 {status} Said\r\n{head}\r\n\r\n{all}");
        }
    });
    url
}

/// What servers answer that say `rows`, with at most `most` log-probabilities at a position.
fn engine(rows: Vec<Vec<f64>>, most: usize) -> impl Fn(&str, &Value) -> (u16, Value) + Send {
    move |path, body| {
        let all = |row: &Vec<f64>| row.iter().copied().enumerate().take(most).collect::<Vec<_>>();
        let answer = match path {
            "/v1/models" => json!({ "data": [{ "id": "acid" }] }),
            "/version" => json!({ "version": "1.2.3" }),
            "/v1/completions" => {
                assert_eq!(body["model"], "acid");
                assert_eq!(body["prompt"].as_array().unwrap().len(), rows.len() + 1);
                let of = |row| -> Value {
                    let at = |(id, v): (usize, f64)| (id.to_string(), json!({ "logprob": v }));
                    Value::Object(all(row).into_iter().map(at).collect())
                };
                let list = [Value::Null].into_iter().chain(rows.iter().map(of));
                json!({ "choices": [{ "prompt_logprobs": list.collect::<Vec<_>>() }] })
            }
            "/generate" => {
                let of = |row| {
                    json!(all(row).iter().map(|(id, v)| json!([v, id, null])).collect::<Vec<_>>())
                };
                let list = [Value::Null].into_iter().chain(rows.iter().map(of));
                json!({ "meta_info": { "input_top_logprobs": list.collect::<Vec<_>>() } })
            }
            "/completion" => {
                let token = body["prompt"][0].as_u64().unwrap() as usize;
                let list = all(&rows[token]).into_iter();
                let list =
                    list.map(|(id, v)| json!({ "id": id, "logprob": v })).collect::<Vec<_>>();
                json!({ "completion_probabilities": [{ "top_logprobs": list }] })
            }
            _ => return (404, json!({ "error": { "message": "there is no such path" } })),
        };
        (200, answer)
    }
}

fn rows(name: &str) -> Vec<Vec<f64>> {
    let file: Value = serde_json::from_slice(&std::fs::read(said(name)).unwrap()).unwrap();
    serde_json::from_value(file["log_probabilities"].clone()).unwrap()
}

#[test]
fn servers_are_asked_in_their_own_words() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    json(["acid", "write", path, "--family", "mixtral", "--form", "f32", "--json"]);
    let checkpoint = format!("{path}/mixtral-f32");
    let save = format!("{path}/said.json");
    let (right, swapped) = (rows("mixtral-f32"), rows("mixtral-f32-swap"));
    for name in ["vllm", "sglang", "llama-server"] {
        let url = server(engine(right.clone(), usize::MAX));
        let mut args = vec!["acid", "ask", &checkpoint, "--url", &url, "--engine", name, "--json"];
        args.extend(["--save", &save]);
        let found = json(args);
        assert_eq!(found["ok"], true, "{name}: {found:#}");
        let version = if name == "vllm" { " 1.2.3" } else { "" };
        assert_eq!(found["checkpoints"][0]["engine"], format!("{name}{version}, f32"));
        assert_eq!(json(["acid", "read", &save, "--json"])["ok"], true);

        let url = server(engine(swapped.clone(), usize::MAX));
        let output = moe_runner(["acid", "ask", &checkpoint, "--url", &url, "--engine", name]);
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("gate and up swapped"), "{name}: {text}");

        let url = server(engine(right.clone(), 20));
        let said = refused(1, ["acid", "ask", &checkpoint, "--url", &url, "--engine", name]);
        assert!(said.contains("of 20 tokens came"), "{name}: {said}");
        assert_eq!(said.contains("--max-logprobs"), name == "vllm", "{said}");
    }
}

#[test]
fn servers_that_refuse_are_quoted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    json(["acid", "write", path, "--family", "mixtral", "--form", "f32", "--json"]);
    let checkpoint = format!("{path}/mixtral-f32");
    let url = server(|_, _| (400, json!({ "error": { "message": "no such model" } })));
    let said = refused(1, ["acid", "ask", &checkpoint, "--url", &url]);
    assert!(said.contains("status 400: no such model"), "{said}");
    let url = server(|_, _| (200, json!({ "data": [] })));
    assert!(refused(1, ["acid", "ask", &checkpoint, "--url", &url]).contains("give --model"));
    let said = refused(1, ["acid", "ask", &checkpoint, "--url", &url, "--model", "acid"]);
    assert!(said.contains("prompt_logprobs"), "{said}");
    for (url, engine, code, words) in [
        ("https://127.0.0.1", "vllm", 2, "begins with http://"),
        ("http://127.0.0.1", "other", 2, "llama-server"),
        ("http://127.0.0.1:9", "vllm", 1, "does not answer"),
    ] {
        let said = refused(code, ["acid", "ask", &checkpoint, "--url", url, "--engine", engine]);
        assert!(said.contains(words), "{said}");
    }
    let said = refused(1, ["acid", "ask", path, "--url", "http://127.0.0.1:9"]);
    assert!(said.contains("acid write"), "{said}");
}
