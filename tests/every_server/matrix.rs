//! The matrix: designs by acts, for people (`matrix.md`) and for programs (`matrix.json`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serverlab::lab::verdict::Verdict;

use crate::acts::ACTS;

/// Verdicts by act, by family, by design.
type Rows = BTreeMap<String, BTreeMap<String, BTreeMap<String, Verdict>>>;

#[derive(Debug, Default, Serialize, Deserialize)]
struct Matrix {
    kernel: String,
    network: String,
    rows: Rows,
}

/// One test at a time changes the files.
static FILES: Mutex<()> = Mutex::new(());

/// Puts what one design did over one family into the files in this folder. Rows of designs that are
/// no more go; those of earlier runs stay until the same is run again. Prints the matrix when it has
/// a verdict for each of these designs from this very process.
pub(crate) fn record(
    folder: &Path,
    network: &str,
    (design, family): (&str, &str),
    verdicts: BTreeMap<String, Verdict>,
    designs: &[&str],
) -> anyhow::Result<()> {
    static FRESH: Mutex<usize> = Mutex::new(0);
    let _turn = FILES.lock().unwrap_or_else(PoisonError::into_inner);
    let json = folder.join("matrix.json");
    let before = fs::read(&json).ok().and_then(|text| serde_json::from_slice::<Matrix>(&text).ok());
    let mut matrix = before.unwrap_or_default();
    matrix.kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    matrix.network = network.to_owned();
    matrix.rows.retain(|name, _| designs.contains(&name.as_str()));
    matrix.rows.entry(design.to_owned()).or_default().insert(family.to_owned(), verdicts);
    fs::create_dir_all(folder)?;
    let text = matrix.markdown(designs);
    replace(&json, &serde_json::to_string_pretty(&matrix)?)?;
    replace(&folder.join("matrix.md"), &text)?;
    let mut fresh = FRESH.lock().unwrap_or_else(PoisonError::into_inner);
    *fresh += 1;
    if *fresh == 2 * designs.len() {
        use std::io::Write as _;
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
    Ok(())
}

fn replace(file: &Path, text: &str) -> anyhow::Result<()> {
    let fresh = file.with_extension(format!("{}.new", std::process::id()));
    let hint = || format!("cannot write {}", file.display());
    fs::write(&fresh, text).with_context(hint)?;
    fs::rename(&fresh, file).with_context(hint)
}

impl Matrix {
    /// A table with a column for each act, by its number, and the legend below.
    fn markdown(&self, designs: &[&str]) -> String {
        let mut text = String::from("# every_server: designs by acts\n\n| design |");
        for number in 1..=ACTS.len() {
            let _ = write!(text, " {number} |");
        }
        text += "\n|---|";
        text += &"---|".repeat(ACTS.len());
        for design in designs.iter().filter(|design| self.rows.contains_key(**design)) {
            let _ = write!(text, "\n| {design} |");
            for act in ACTS {
                let _ = write!(text, " {} |", self.cell(design, act.name));
            }
        }
        text += "\n\nOver IPv4 and IPv6: `ok` if both pass, else the verdicts of both.\n\n";
        for (number, act) in ACTS.iter().enumerate() {
            let _ = writeln!(text, "{}. {}", number + 1, act.name);
        }
        let _ = writeln!(text, "\nNetwork: {}. Kernel: Linux {}.", self.network, self.kernel);
        text
    }

    fn cell(&self, design: &str, act: &str) -> String {
        let words = ["ipv4", "ipv6"].map(|family| {
            let verdict = self.rows.get(design).and_then(|row| row.get(family)?.get(act));
            verdict.map_or("-", Verdict::word)
        });
        match words {
            ["pass", "pass"] => "ok".to_owned(),
            [four, six] => format!("{four}/{six}"),
        }
    }
}
