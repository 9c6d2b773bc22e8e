//! `railhop doctor`: what is here, what is missing, and what to do about it.
//!
//! A file per topic, each a function from [`Machine`] to what it has found; nothing is changed.

mod cores;
mod finding;
mod gpu;
mod launcher;
mod machine;
mod memory;
mod network;
mod rdma;

use std::error::Error;
use std::process::ExitCode;

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::{Map, Value};

use self::finding::{Finding, State, Topic};
use self::machine::Machine;

/// Columns that the table may take.
const WIDTH: u16 = 120;

/// What is to be looked at.
#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// Topics of which nothing may be missing, separated by commas: the exit code is 1 if something is
    #[arg(long, value_delimiter = ',', value_name = "TOPICS")]
    require: Vec<Topic>,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// Prints the findings; the code to exit with.
pub fn run(args: &DoctorArgs) -> Result<ExitCode, Box<dyn Error + Send + Sync>> {
    let findings = examine(&Machine::here());
    match args.json {
        true => println!("{}", report(&findings)),
        false => print_table(&findings),
    }
    let is_missing =
        |finding: &Finding| finding.state == State::Missing && args.require.contains(&finding.topic);
    Ok(if findings.iter().any(is_missing) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Everything, topic by topic.
fn examine(machine: &Machine) -> Vec<Finding> {
    let topics = [rdma::findings, gpu::findings, memory::findings, cores::findings, network::findings];
    let mut findings: Vec<_> = topics.into_iter().flat_map(|topic| topic(machine)).collect();
    findings.extend(launcher::findings(|name| std::env::var(name).ok()));
    findings
}

/// An object with a list per topic.
fn report(findings: &[Finding]) -> Value {
    let mut topics = Map::new();
    for finding in findings {
        let list = topics.entry(finding.topic.to_string()).or_insert_with(|| Value::Array(Vec::new()));
        list.as_array_mut().expect("made as a list").push(finding.json());
    }
    Value::Object(topics)
}

fn print_table(findings: &[Finding]) {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_content_arrangement(ContentArrangement::Dynamic).set_width(WIDTH);
    table.set_header(["topic", "what", "", "found"]);
    let mut topic = None;
    for finding in findings {
        let name = if topic == Some(finding.topic) { String::new() } else { finding.topic.to_string() };
        topic = Some(finding.topic);
        let found = match &finding.advice {
            Some(advice) => format!("{}\n→ {advice}", finding.value),
            None => finding.value.clone(),
        };
        table.add_row([name, finding.name.clone(), finding.state.to_string(), found]);
    }
    println!("{table}");
}
